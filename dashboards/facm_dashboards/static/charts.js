"use strict";
// Draws what the server describes (charts.py), and hands it out as CSV or PNG.
(() => {
  const drawn = new Map();
  const narrow = () => innerWidth < 720;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colours = () => [0, 1, 2, 3, 4, 5, 6, 7].map((k) => css(`s${k}`));
  const SYMBOLS = ["circle", "rect", "triangle", "diamond", "roundRect", "pin", "arrow", "circle"];
  // Viridis, from low to high; the dark theme reads it the other way, so that low is near the ground.
  const VIRIDIS = ["#fde725", "#8fd744", "#35b779", "#21908d", "#31688e", "#443a83", "#440154"];

  const plain = (value) => {
    if (typeof value !== "number") return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
    return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const written = (axis) => (value) => {
    if (axis.form === "percent") return `${Number((100 * value).toPrecision(3))} %`;
    if (axis.form === "images" && value >= 1000) return value >= 1e6 ? `${Number((value / 1e6).toPrecision(4))}M` : `${Number((value / 1000).toPrecision(4))}k`;
    return plain(Number(value));
  };

  const axisOf = (axis, upwards) => {
    const line = { lineStyle: { color: css("line") } };
    const shown = {
      name: axis.name,
      nameLocation: upwards ? "end" : "middle",
      nameGap: upwards ? 12 : 28,
      nameTextStyle: { color: css("soft"), align: upwards ? "left" : "center", padding: upwards ? [0, 0, 0, -8] : 0 },
      axisLabel: { color: css("soft"), formatter: axis.labels.length ? undefined : written(axis), hideOverlap: true },
      axisLine: line,
      axisTick: { show: false },
      splitLine: { show: upwards, lineStyle: { color: css("line"), opacity: 0.7 } },
    };
    if (axis.labels.length) return { ...shown, type: "category", data: axis.labels };
    return { ...shown, type: axis.log ? "log" : "value", logBase: axis.base || 10, min: axis.low ?? undefined, max: axis.high ?? undefined, scale: axis.low === null, minorSplitLine: { show: false } };
  };

  // A logarithmic axis shows whole powers only: of ten, of two where these are few, and where these
  // are few, too, it is no logarithmic axis.
  const fitted = (axis, values) => {
    const positive = values.filter((value) => value > 0);
    const [low, high] = [Math.min(...positive), Math.max(...positive)];
    if (!axis.log || positive.length < values.length || high / low < 8) return { ...axis, log: false };
    return { ...axis, base: high / low > 300 ? 10 : 2 };
  };

  const room = (more) => ({ left: 10, right: 18, top: 30, bottom: 8, outerBoundsMode: "same", outerBoundsContain: "all", outerBoundsClampWidth: "60%", ...more });

  const base = () => ({
    animation: false,
    color: colours(),
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: css("ink") },
    aria: { enabled: true },
    // On the canvas: markup with styles in it would offend the policy of the page.
    tooltip: {
      renderMode: "richText",
      confine: true,
      backgroundColor: css("paper"),
      borderColor: css("line"),
      textStyle: { color: css("ink"), fontSize: 12 },
    },
  });

  const whiskers = (series, colour) => ({
    type: "custom",
    name: series.name,
    itemStyle: { color: colour },
    tooltip: { show: false },
    silent: true,
    data: series.points.filter((point) => point.length > 2 && point[2] !== null).map(([x, y, e]) => [x, y - e, y + e]),
    encode: { x: 0, y: [1, 2] },
    renderItem: (params, api) => {
      const [x, top] = api.coord([api.value(0), api.value(2)]);
      const [, bottom] = api.coord([api.value(0), api.value(1)]);
      const style = { stroke: colour, lineWidth: 1.3, fill: null };
      const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style });
      return { type: "group", children: [line(x, top, x, bottom), line(x - 4, top, x + 4, top), line(x - 4, bottom, x + 4, bottom)] };
    },
  });

  const lines = (chart) => {
    const palette = colours();
    const values = chart.series.flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null);
    const many = chart.series.length > 8;
    const series = chart.series.flatMap((one, k) => {
      const colour = one.style === "best" ? css("s1") : one.style === "faint" ? css("s7") : palette[(one.colour ?? k) % 8];
      const dots = one.style === "dots";
      const main = {
        type: dots ? "scatter" : "line",
        name: one.name,
        data: one.points.map((p, i) => ({ value: [p[0], p[1]], name: one.names[i] || "" })),
        symbol: SYMBOLS[(one.colour ?? k) % 8],
        symbolSize: dots || one.style === "best" ? 9 : 6,
        showSymbol: one.points.length < 40,
        color: colour,
        itemStyle: { color: colour },
        lineStyle: { width: one.style === "faint" ? 1 : 2, opacity: one.style === "faint" ? 0.55 : 1, color: colour },
        emphasis: { focus: "none" },
      };
      return one.points.some((p) => p.length > 2 && p[2] !== null) ? [main, whiskers(one, colour)] : [main];
    });
    const names = chart.series.some((s) => s.names.length);
    const y = fitted(chart.y, values);
    return {
      ...base(),
      grid: room({ top: chart.series.length > 1 && !many ? 54 : 30 }),
      legend: { show: chart.series.length > 1 && !many, top: 0, left: 0, type: "scroll", itemWidth: 16, itemHeight: 13, itemGap: 12, textStyle: { color: css("ink") }, inactiveColor: css("soft"), pageTextStyle: { color: css("soft") }, data: chart.series.map((s) => s.name) },
      xAxis: axisOf(chart.x.form === "images" ? { ...chart.x, low: 0, high: Math.max(...chart.series.flatMap((s) => s.points.map((p) => p[0]))) } : chart.x, false),
      yAxis: axisOf(y, true),
      tooltip: {
        ...base().tooltip,
        trigger: names || many ? "item" : "axis",
        axisPointer: { lineStyle: { color: css("soft") } },
        formatter: (given) => {
          const points = [given].flat().filter((point) => point.seriesType !== "custom");
          if (!points.length) return "";
          const at = chart.x.labels.length ? chart.x.labels[points[0].value[0]] : Number(points[0].value[0]).toLocaleString("en");
          const rows = points.map((point) => {
            const found = chart.series.find((s) => s.name === point.seriesName).points.find((p) => p[0] === point.value[0] && p[1] === point.value[1]);
            const error = found && found[2] ? ` ± ${written({ form: "" })(found[2])}` : "";
            return `${point.name || point.seriesName}: ${written(chart.y)(point.value[1])}${error}`;
          });
          return `${chart.x.name || ""} ${at}\n${rows.join("\n")}`;
        },
      },
      series,
    };
  };

  const heat = (chart) => {
    const dark = document.documentElement.dataset.theme === "dark";
    const points = chart.series[0].points;
    const shade = (value) => (chart.value.log && value > 0 ? Math.log10(value) : value);
    const shades = points.map((p) => shade(p[2]));
    const few = points.length <= 40;
    return {
      ...base(),
      grid: room({ right: narrow() ? 8 : 96, top: 14, bottom: narrow() ? 48 : 8 }),
      xAxis: { ...axisOf(chart.x, false), axisLabel: { color: css("soft"), hideOverlap: true, formatter: chart.x.form ? (v) => written(chart.x)(Number(v)) : undefined }, splitLine: { show: false } },
      yAxis: { ...axisOf(chart.y, true), name: "", splitLine: { show: false } },
      visualMap: {
        dimension: 3,
        min: Math.min(...shades),
        max: Math.max(...shades),
        calculable: false,
        orient: narrow() ? "horizontal" : "vertical",
        right: narrow() ? "center" : 0,
        top: narrow() ? undefined : 24,
        bottom: narrow() ? 0 : undefined,
        left: narrow() ? "center" : undefined,
        itemWidth: 12,
        itemHeight: 120,
        text: [plain(Math.max(...points.map((p) => p[2]))), plain(Math.min(...points.map((p) => p[2])))],
        textStyle: { color: css("soft") },
        inRange: { color: dark ? [...VIRIDIS].reverse() : VIRIDIS },
      },
      tooltip: { ...base().tooltip, formatter: ({ value }) => `${chart.x.name} ${chart.x.labels[value[0]]}\n${chart.y.name || ""} ${chart.y.labels[value[1]]}\n${chart.value.name}: ${plain(value[2])}` },
      series: [{ type: "heatmap", name: chart.value.name, data: points.map((p, i) => [...p, shades[i]]), encode: { x: 0, y: 1, value: 3 }, label: { show: few, formatter: ({ value }) => plain(value[2]), color: "#111", backgroundColor: "rgba(255,255,255,.82)", padding: [1, 4], borderRadius: 3, fontSize: 11, textBorderWidth: 0 } }],
    };
  };

  const bars = (chart) => ({
    ...base(),
    grid: room({ right: 56, top: 8 }),
    xAxis: { ...axisOf(chart.x, false), splitLine: { show: true, lineStyle: { color: css("line") } } },
    yAxis: { ...axisOf(chart.y, true), axisLabel: { color: css("ink"), fontSize: 11, lineHeight: 13, formatter: (name) => (narrow() ? name.replace(".", ".\n") : name).replace(" (", "\n(") } },
    tooltip: { show: false },
    series: [{ type: "bar", name: chart.series[0].name, data: chart.series[0].points, barMaxWidth: 22, label: { show: true, position: "right", color: css("ink"), formatter: ({ value }) => written(chart.x)(value[0]) } }],
  });

  const parallel = (chart) => {
    const dark = document.documentElement.dataset.theme === "dark";
    const last = chart.axes.length - 1;
    const points = chart.series[0].points;
    const results = points.map((p) => p[last]).filter((v) => v !== null).map(Math.log);
    return {
      ...base(),
      parallel: { left: 70, right: 70, top: 50, bottom: 24, layout: narrow() ? "vertical" : "horizontal", ...(narrow() ? { left: 16, right: 24, top: 40, bottom: 30 } : {}) },
      parallelAxis: chart.axes.map((axis, dim) => ({
        dim,
        name: narrow() ? axis.name : axis.name.replace(" (", "\n("),
        nameTextStyle: { color: css("ink"), fontSize: 11, lineHeight: 14 },
        nameLocation: narrow() ? "start" : "end",
        ...(narrow() ? { nameGap: 0, nameTextStyle: { color: css("ink"), fontSize: 11, align: "left", verticalAlign: "bottom", padding: [0, 0, 8, 0] } } : {}),
        // A result has no range of its own, as values of the space have.
        ...(axis.labels.length
          ? { type: "category", data: axis.labels }
          : { type: axis.log && axis.low !== null ? "log" : "value", min: axis.low ?? "dataMin", max: axis.high ?? "dataMax" }),
        axisLine: { lineStyle: { color: css("soft") } },
        axisTick: { show: false },
        splitNumber: 3,
        axisLabel: { color: css("soft"), formatter: axis.labels.length ? undefined : plain, hideOverlap: true },
      })),
      visualMap: { show: false, dimension: last + 1, min: Math.min(...results), max: Math.max(...results), inRange: { color: dark ? ["#9bd0ff", "#3d5068"] : ["#083d77", "#b9c6d6"] } },
      tooltip: { ...base().tooltip, formatter: ({ name, value }) => `${name}\n${chart.axes.map((a, k) => `${a.name}: ${a.labels.length && a.labels[value[k]] ? a.labels[value[k]] : plain(value[k])}`).join("\n")}` },
      series: [{ type: "parallel", lineStyle: { width: 2, opacity: 0.9 }, inactiveOpacity: 0.04, data: points.map((p, k) => ({ name: chart.series[0].names[k], value: [...p.map((v) => v ?? "-"), Math.log(p[last])] })) }],
    };
  };

  const KINDS = { lines, heat, bars, parallel };

  const draw = (chart) => {
    const place = document.querySelector(`[data-chart="${CSS.escape(chart.key)}"]`);
    if (!place) return;
    const known = drawn.get(chart.key);
    const instance = known ? known.instance : echarts.init(place, null, { renderer: "canvas" });
    instance.setOption(KINDS[chart.kind](chart), true);
    place.setAttribute("aria-label", `${chart.title}: ${chart.series.length} series`);
    if (chart.linked) instance.group = "linked";
    drawn.set(chart.key, { chart, instance });
  };

  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    // A leading =, + or @ would be a formula to a spreadsheet.
    const safe = /^[=+@]|^-[^0-9.]/.test(text) ? `'${text}` : text;
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const table = (chart) => {
    const named = (axis, value) => (axis.labels.length && value !== null ? axis.labels[value] : value);
    if (chart.kind === "parallel") {
      const rows = chart.series[0].points.map((p, k) => [chart.series[0].names[k], ...p.map((v, a) => named(chart.axes[a], v))]);
      return [["trial", ...chart.axes.map((a) => a.name)], ...rows];
    }
    const third = chart.kind === "heat" ? chart.value.name || "value" : "standard error";
    const head = ["series", chart.x.name || "x", chart.y.name || "y", third];
    return [head, ...chart.series.flatMap((s) => s.points.map((p, k) => [s.names[k] || s.name, named(chart.x, p[0]), named(chart.y, p[1]), p[2] ?? ""]))];
  };
  const save = (name, blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const bytes = (address) => Uint8Array.from(atob(address.split(",")[1]), (c) => c.charCodeAt(0));
  document.addEventListener("click", (event) => {
    const kind = event.target.dataset && event.target.dataset.export;
    if (!kind) return;
    const { chart, instance } = drawn.get(event.target.closest("figure").querySelector("[data-chart]").dataset.chart);
    const name = `${document.querySelector("h1").textContent.trim()}-${chart.key}`.replace(/[^\w.-]+/g, "-");
    if (kind === "csv") save(`${name}.csv`, new Blob([table(chart).map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    else save(`${name}.png`, new Blob([bytes(instance.getDataURL({ pixelRatio: 2, backgroundColor: css("paper") }))], { type: "image/png" }));
  });

  const load = async (grid) => {
    try {
      const answer = await fetch(grid.dataset.charts);
      const told = await answer.json();
      if (!answer.ok) throw new Error(told.error);
      told.filter((chart) => chart.series.some((s) => s.points.length)).forEach(draw);
      echarts.connect("linked");
      grid.dataset.ready = "";
    } catch (error) {
      for (const place of grid.querySelectorAll(".plot:empty")) place.textContent = `Not drawn: ${error.message}`;
    }
  };
  const redraw = () => drawn.forEach(({ chart }) => draw(chart));
  document.addEventListener("themechange", redraw);
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      drawn.forEach(({ instance }) => instance.resize());
      redraw();
    }, 150);
  });
  for (const grid of document.querySelectorAll("[data-charts]")) {
    load(grid);
    if ("refresh" in grid.dataset) setInterval(() => document.hidden || load(grid), 5000);
  }
})();
