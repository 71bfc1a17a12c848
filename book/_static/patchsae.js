/* What pages do without a network: open the code of a figure, filter the report. */
"use strict";

document.addEventListener("click", (event) => {
  const link = event.target.closest("a.to-code");
  const details = link?.closest(".cell")?.querySelector("details");
  if (!details) return;
  event.preventDefault();
  details.open = true;
  details.scrollIntoView({ block: "start" });
  details.querySelector("summary")?.focus();
});

document.addEventListener("DOMContentLoaded", () => {
  for (const filter of document.querySelectorAll(".filter")) {
    const rows = [...document.querySelectorAll("table.rows tr[data-verdict]")];
    const buttons = [...filter.querySelectorAll("button")];
    const told = filter.querySelector("[role=status]");
    for (const button of buttons) {
      button.addEventListener("click", () => {
        const wanted = button.dataset.verdict;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        for (const row of rows) row.hidden = Boolean(wanted) && row.dataset.verdict !== wanted;
        if (told) told.textContent = `${rows.filter((row) => !row.hidden).length} rows shown`;
      });
    }
  }
  // the theme puts the book's name and its search outside of every landmark
  const side = document.querySelector(".bd-sidebar-primary");
  side?.setAttribute("role", "navigation");
  side?.setAttribute("aria-label", "Book");
  // nor does it name what opens a part of the contents
  for (const opener of side?.querySelectorAll("summary") ?? []) {
    const part = opener.closest("li")?.querySelector("a")?.textContent.trim();
    if (!opener.textContent.trim()) opener.setAttribute("aria-label", `Pages of ${part}`);
  }
  // a wide table scrolls in its own box, by keyboard too
  const reachable = () => {
    for (const box of document.querySelectorAll(".results, div.drawn, .cell_output .output, .table-box, pre, .bd-article mjx-container")) {
      if (box.scrollWidth > box.clientWidth + 1 && !box.hasAttribute("tabindex")) box.tabIndex = 0;
    }
  };
  reachable();
  addEventListener("resize", reachable);
});
