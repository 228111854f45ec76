"use strict";
// Sort a table by a click on its head, and save it as CSV. The page is complete without this script.
(function () {
  function value(cell) {
    return cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent;
  }
  function compare(a, b, numeric) {
    if (!numeric) return a.localeCompare(b, "en", { numeric: true });
    const missing = (text) => text === "" || Number.isNaN(Number(text));
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return Number(a) - Number(b);
  }
  function sort(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.classList.contains("number");
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, two) => {
      const a = value(one.cells[column]), b = value(two.cells[column]);
      const order = compare(a, b, numeric);
      // A missing number stays last whichever way the column is sorted.
      return down && !(numeric && (a === "" || b === "")) ? -order : order;
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows);
  }
  function csv(table) {
    const quote = (text) => (/[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
    return [...table.rows].map((row) => [...row.cells].map((cell) => {
      return quote(cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim());
    }).join(",")).join("\n") + "\n";
  }
  document.querySelectorAll("div.table").forEach((box) => {
    const table = box.querySelector("table");
    if (table.tBodies[0].rows[0].cells.length === table.tHead.rows[0].cells.length) {
      table.querySelectorAll("th button").forEach((button, column) => {
        button.addEventListener("click", () => sort(table, column));
      });
    }
    const save = box.querySelector("button.csv");
    save.hidden = false;
    save.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(table));
      link.download = save.dataset.name;
      link.click();
    });
  });
})();
