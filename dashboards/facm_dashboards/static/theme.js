"use strict";
// Before anything is painted: the colours of the system, or those that were chosen.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem("theme") || "auto";
  const apply = () => {
    const theme = chosen();
    const next = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
    if (root.dataset.theme !== next) {
      root.dataset.theme = next;
      document.dispatchEvent(new Event("themechange"));
    }
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
      button.setAttribute("aria-label", `Colours: ${{ auto: "Auto, as the system has them", light: "Light", dark: "Dark" }[theme]}`);
    }
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      const order = ["auto", "light", "dark"];
      localStorage.setItem("theme", order[(order.indexOf(chosen()) + 1) % 3]);
      apply();
    });
    // Parts of a page that change: fetched as they are, escaped by the server.
    for (const part of document.querySelectorAll("[data-live]")) setInterval(() => renew(part), 5000);
  });
  const renew = async (part) => {
    if (document.hidden || part.contains(document.activeElement)) return;
    try {
      const answer = await fetch(part.dataset.live);
      if (!answer.ok) return;
      part.innerHTML = await answer.text();
      part.dispatchEvent(new Event("renewed"));
    } catch {
      // The server is away; the next time may do.
    }
  };
})();
