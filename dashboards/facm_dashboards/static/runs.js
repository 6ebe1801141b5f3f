"use strict";
// Which runs are chosen survives a renewal of the table.
(() => {
  const MOST = 8;
  const rows = document.getElementById("rows");
  const told = document.getElementById("chosen");
  const go = document.getElementById("go");
  const chosen = new Set();
  const boxes = () => [...rows.querySelectorAll("input[name=run]")];
  const show = () => {
    for (const box of boxes()) {
      box.checked = chosen.has(box.value);
      box.disabled = chosen.size >= MOST && !box.checked;
    }
    go.disabled = chosen.size === 0;
    told.textContent = chosen.size === 0 ? "Choose up to 8 runs." : `${chosen.size} of ${MOST} chosen.`;
  };
  rows.addEventListener("change", (event) => {
    if (event.target.name !== "run") return;
    if (event.target.checked) chosen.add(event.target.value);
    else chosen.delete(event.target.value);
    show();
  });
  rows.addEventListener("renewed", show);
  for (const box of boxes()) if (box.checked) chosen.add(box.value);
  show();
  // The list of a job changes at once; without this script, the button does it.
  document.querySelector("#filters select").addEventListener("change", (event) => event.target.form.submit());
})();
