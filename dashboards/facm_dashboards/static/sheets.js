"use strict";
// The picture at a place of training and a number of steps.
(() => {
  const sheets = document.getElementById("sheets");
  if (!sheets) return;
  const items = [...sheets.querySelectorAll("li")].map((item) => item.dataset);
  const values = (name) => [...new Set(items.map((item) => Number(item[name])))].sort((a, b) => a - b);
  const images = values("images");
  const steps = values("steps");
  const [atImages, atSteps] = ["at-images", "at-steps"].map((id) => document.getElementById(id));
  const state = new URLSearchParams(location.search);
  const from = (name, list, input) => {
    const place = list.indexOf(Number(state.get(name)));
    if (state.has(name) && place >= 0) input.value = place;
  };
  from("images", images, atImages);
  from("steps", steps, atSteps);
  const show = (event) => {
    const [i, s] = [images[atImages.value], steps[atSteps.value]];
    const found = items.find((item) => Number(item.images) === i && Number(item.steps) === s);
    document.getElementById("told-images").textContent = `${i.toLocaleString("en")} images`;
    document.getElementById("told-steps").textContent = s;
    for (const [input, text] of [[atImages, `${i} images`], [atSteps, `${s} steps`]]) input.setAttribute("aria-valuetext", text);
    if (found) document.getElementById("student").src = found.href;
    if (event) {
      state.set("images", i);
      state.set("steps", s);
      history.replaceState(null, "", `?${state}`);
    }
  };
  atImages.addEventListener("input", show);
  atSteps.addEventListener("input", show);
  show();
})();
