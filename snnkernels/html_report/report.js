"use strict";
// A click on a heading sorts by its column: numbers largest first, words from A on; then reversed.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const number = head.classList.contains("n");
      const now = head.getAttribute("aria-sort");
      const first = number ? "descending" : "ascending";
      const other = number ? "ascending" : "descending";
      const order = now === first ? other : first;
      for (const h of heads) h.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        if (!number) return cell.textContent;
        const value = cell.dataset.value;
        return value === undefined ? null : value === "inf" ? Infinity : Number(value);
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // empty cells come last
        return sign * (number ? a - b : a.localeCompare(b, "en", { numeric: true })) || 0;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
