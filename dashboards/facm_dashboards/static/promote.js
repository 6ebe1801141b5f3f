"use strict";
// Gates take a moment: say so, and send the form once.
for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", () => {
    const button = form.querySelector("button");
    button.disabled = true;
    button.textContent = button.dataset.wait;
  });
}
