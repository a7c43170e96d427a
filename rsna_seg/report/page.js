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

// A long table has a field that finds rows by their text, and a choice for each column of few
// texts, such as the state of a scan.
function choices(table, column) {
  const texts = new Set([...table.tBodies[0].rows].map(row => row.cells[column].dataset.value));
  texts.delete("");
  const short = [...texts].every(text => text.length < 25);
  return short && texts.size > 1 && texts.size < 7 ? [...texts].sort() : [];
}
function addSearch(table) {
  const rows = [...table.tBodies[0].rows].map(row => {
    const texts = [...row.cells].map(cell => cell.textContent.toLowerCase());
    return { row, text: texts.join("\n") };
  });
  const bar = document.createElement("div"), count = document.createElement("output");
  const field = Object.assign(document.createElement("input"), { type: "search", autocomplete: "off" });
  bar.className = "search";
  const label = (text, control) => {
    const element = document.createElement("label");
    element.append(`${text} `, control);
    bar.append(element);
  };
  label("Find", field);
  const chosen = [...table.tHead.rows[0].cells].flatMap((head, column) => {
    const button = head.querySelector("button:not([data-numeric])");
    const texts = button && column ? choices(table, column) : [];
    if (!texts.length) return [];
    const select = document.createElement("select");
    select.autocomplete = "off";
    select.append(new Option("all", ""), ...texts.map(text => new Option(text, text)));
    label(button.textContent, select);
    return [{ select, column }];
  });
  const filter = () => {
    const words = field.value.trim().toLowerCase();
    let shown = 0;
    for (const { row, text } of rows) {
      const fits = chosen.every(({ select, column }) =>
        !select.value || row.cells[column].dataset.value === select.value);
      row.hidden = !(fits && text.includes(words));
      shown += !row.hidden;
    }
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  };
  bar.addEventListener("input", filter);
  bar.append(count);
  table.closest(".scroll").before(bar);
}
for (const table of document.querySelectorAll(".scroll table")) {
  if (table.tBodies[0].rows.length > 10 && table.querySelector("thead button")) addSearch(table);
}

// Pictures: a click shows one as large as the window, a second in its own pixels.
const large = document.createElement("dialog");
large.className = "enlarged";
large.addEventListener("click", event => {
  if (event.target.tagName === "IMG") large.classList.toggle("whole");
  else large.close();
});
for (const image of document.querySelectorAll("figure img")) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "⤢" });
  button.className = "enlarge";
  button.title = "as large as the window; again: every pixel";
  button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
  const show = () => {
    const close = Object.assign(document.createElement("button"), { textContent: "Close" });
    const copy = Object.assign(new Image(), { src: image.src, alt: image.alt });
    large.replaceChildren(close, copy);
    large.classList.remove("whole");
    document.body.append(large);
    large.showModal();
  };
  button.addEventListener("click", show);
  image.addEventListener("click", show);
  image.after(button);
}

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
