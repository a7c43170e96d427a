// Tables: a click on a heading sorts the rows. What is compared are the values, not their text,
// and rows that compare equal keep their order. A missing value stays last either way.
function sortTable(button) {
  const head = button.closest("th");
  const body = head.closest("table").tBodies[0];
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const numeric = "numeric" in button.dataset;
  const compare = numeric
    ? (a, b) => (a < b ? -1 : +(a > b))
    : (a, b) => a.localeCompare(b, undefined, { numeric: true });
  const rows = [...body.rows].map(row => {
    const text = row.cells[head.cellIndex].dataset.value;
    return { row, none: text === "", value: numeric ? Number(text) : text };
  });
  rows.sort((a, b) => a.none - b.none || (a.none ? 0 : sign * compare(a.value, b.value)));
  for (const { row } of rows) body.append(row);
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}
document.addEventListener("click", event => {
  const button = event.target.closest("thead button");
  if (button) sortTable(button);
});
document.documentElement.classList.add("scripted");

// Links: one to a closed part opens it and hands it the focus, so that a screen reader reads on.
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  let box = target && target.closest("details");
  for (; box; box = box.parentElement.closest("details")) box.open = true;
  if (!target || target.tagName !== "DETAILS") return;
  target.scrollIntoView();
  target.querySelector("summary").focus({ preventScroll: true });
}
addEventListener("hashchange", openTarget);
addEventListener("load", openTarget);
document.addEventListener("click", event => {
  const link = event.target.closest('a[href^="#"]');
  if (!link || link.hash !== location.hash) return;
  event.preventDefault();
  openTarget();
});

// Paper cannot be opened: for the printer all parts are open.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const box of closed) box.open = true;
  for (const image of document.images) image.loading = "eager";
});
addEventListener("afterprint", () => {
  for (const box of closed) box.open = false;
});
