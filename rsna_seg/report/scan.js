// Slices. One is unpacked when asked for, its neighbours ahead of time; the latest fifty stay.
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new DecompressionStream("deflate");
  const writer = stream.writable.getWriter();
  writer.write(bytes);
  writer.close();
  return new Uint8Array(await new Response(stream.readable).arrayBuffer());
}

async function unpackSlice(data, i) {
  const image = new Image();
  image.src = "data:image/jpeg;base64," + data.grey[i];
  const labels = data.mask[i] ? inflate(data.mask[i]) : null;
  await image.decode();
  return { image, labels: await labels };
}

function sliceStore(data) {
  const latest = new Map();
  return i => {
    const slice = latest.get(i) || unpackSlice(data, i);
    latest.delete(i);
    latest.set(i, slice);
    if (latest.size > 50) latest.delete(latest.keys().next().value);
    return slice;
  };
}

// Colours. They go onto a layer of their own, about 1,024 pixels wide however coarse the scan. A
// pixel belongs to the outline if another class lies within two pixels in one of four directions.
function tintLayer(labels, data, scale, fill, line, pixels) {
  const near = 2;
  const clamp = (v, count) => Math.max(0, Math.min(count - 1, Math.floor(v / scale)));
  const padded = { length: data.cols * scale + 2 * near };
  const column = Int32Array.from(padded, (_, x) => clamp(x - near, data.cols));
  const row = y => clamp(y, data.rows) * data.cols;
  pixels.fill(0);
  for (let y = 0, p = 0; labels && y < data.rows * scale; y++) {
    const here = row(y), above = row(y - near), below = row(y + near);
    for (let x = 0; x < data.cols * scale; x++, p++) {
      const c = column[x + near], label = labels[here + c];
      if (label === 0) continue;
      const inside = labels[above + c] === label && labels[below + c] === label
        && labels[here + column[x]] === label && labels[here + column[x + 2 * near]] === label;
      pixels[p] = (inside ? fill : line)[label];
    }
  }
}

function shades(organs, shown, alpha) {
  const table = new Uint32Array(256);
  for (const { id, color } of organs) {
    const [red, green, blue] = [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
    if (shown.has(id)) table[id] = (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;
  }
  return table;
}

// The wheel scrolls the stack, down is towards the feet. It is no trap: a page that is being
// scrolled goes on, and at the ends of the stack the wheel scrolls the page. With Ctrl it zooms.
function scrollByWheel(stage, canStep, step) {
  let turned = 0, pageMoved = -1000;
  addEventListener("scroll", event => { pageMoved = event.timeStamp; }, { passive: true });
  stage.addEventListener("wheel", event => {
    const way = -Math.sign(event.deltaY);
    if (event.ctrlKey || !way || event.timeStamp - pageMoved < 250 || !canStep(way)) return;
    event.preventDefault();
    if (turned * event.deltaY < 0) turned = 0;
    turned += event.deltaMode ? 40 * Math.sign(event.deltaY) : event.deltaY;
    if (Math.abs(turned) < 40) return;
    turned = 0;
    step(way);
  }, { passive: false });
}

// The mouse drags up or right, towards the head. A finger moves sideways through the stack, and
// up and down over the page.
function scrollByDrag(stage, slider, show) {
  let from = null;
  stage.addEventListener("mousedown", event => event.preventDefault());
  stage.addEventListener("pointerdown", event => {
    if (event.button) return;
    slider.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    from = { x: event.clientX, y: event.clientY, at: Number(slider.value) };
  });
  stage.addEventListener("pointermove", event => {
    if (!from) return;
    const pixels = Math.max(4, Math.min(24, stage.clientWidth / (Number(slider.max) + 1)));
    const up = event.pointerType === "touch" ? 0 : from.y - event.clientY;
    show(from.at + Math.round((event.clientX - from.x + up) / pixels));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    stage.addEventListener(end, () => { from = null; });
  }
}

// The viewer. The screen follows from four things: the slice, whether organs are shown, which, and
// how strongly. `show` changes the first and `draw` draws all of them.
function startViewer(box) {
  const find = selector => box.querySelector(selector);
  const data = JSON.parse(find("script").textContent);
  const last = data.grey.length - 1;
  const stage = find(".stage"), canvas = find("canvas"), slider = find(".slice");
  const under = find(".under"), all = find("[role=switch]");
  const scale = Math.max(1, Math.round(1024 / Math.max(data.rows, data.cols)));
  const layer = document.createElement("canvas");
  layer.width = canvas.width = data.cols * scale;
  layer.height = canvas.height = data.rows * scale;
  const context = canvas.getContext("2d"), tint = layer.getContext("2d");
  const colours = tint.createImageData(layer.width, layer.height);
  const pixels = new Uint32Array(colours.data.buffer);
  const slices = sliceStore(data);
  const shown = new Set(data.organs.map(o => o.id));
  let at = data.start, drawn = null, frame = 0, timer = 0;

  function paint() {
    context.drawImage(drawn.image, 0, 0, canvas.width, canvas.height);
    if (all.checked) {
      const fill = shades(data.organs, shown, Math.round(2.55 * find(".opacity").value));
      tintLayer(drawn.labels, data, scale, fill, shades(data.organs, shown, 255), pixels);
      tint.putImageData(colours, 0, 0);
      context.drawImage(layer, 0, 0);
    }
    canvas.dataset.slice = drawn.at;
  }
  function draw() {
    cancelAnimationFrame(frame);
    if (drawn) frame = requestAnimationFrame(paint);
  }

  // A screen reader hears of a new slice half a second after the last step, unless the slider has
  // the focus and speaks for itself.
  function describe() {
    const names = data.organs.filter(o => o.counts[at]).map(o => o.name).join(", ") || "no organ";
    const text = data.texts[at] + ": " + names;
    find(".where b").textContent = data.texts[at];
    find(".where span").textContent = names;
    slider.value = at;
    slider.setAttribute("aria-valuetext", text);
    canvas.setAttribute("aria-label", text + ". The patient's right is on the left.");
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (document.activeElement !== slider) find("[role=status]").textContent = text;
    }, 500);
  }
  // A slice is drawn when all of it is there, so nothing flickers.
  async function show(i) {
    const asked = at = Math.max(0, Math.min(last, i));
    describe();
    const slice = await slices(asked);
    if (asked !== at) return;
    drawn = { ...slice, at };
    draw();
    for (const step of [1, -1, 2, -2, 3, -3]) {
      if (at + step >= 0 && at + step <= last) slices(at + step);
    }
  }

  function toggle(id, on) {
    shown[on ? "add" : "delete"](id);
    find(`.organ[data-id="${id}"]`).setAttribute("aria-pressed", on);
    draw();
  }
  // The next slice with the organ in this direction, or with 0 the one where it is largest.
  function goTo(id, way) {
    const counts = data.organs.find(o => o.id === id).counts;
    let i = way ? at + way : counts.indexOf(Math.max(...counts));
    while (way && i >= 0 && i <= last && !counts[i]) i += way;
    all.checked = true;
    toggle(id, true);
    show(i < 0 || i > last ? at : i);
  }
  function nameUnderPointer(event) {
    const frame = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - frame.top) / frame.height * data.rows);
    const col = Math.floor((event.clientX - frame.left) / frame.width * data.cols);
    const label = drawn && drawn.labels && drawn.labels[row * data.cols + col];
    const organ = label && data.organs.find(o => o.id === label);
    under.textContent = organ ? organ.name : "";
    under.hidden = !organ || !all.checked || !shown.has(organ.id);
  }

  box.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    const id = Number(button.dataset.id);
    if (button.dataset.go) goTo(id, Number(button.dataset.go));
    else toggle(id, !shown.has(id));
  });
  document.addEventListener("click", event => {
    const link = event.target.closest("a[data-organ]");
    if (!link) return;
    event.preventDefault();
    goTo(Number(link.dataset.organ), 0);
    stage.scrollIntoView({ block: "center" });
    slider.focus({ preventScroll: true });
  });
  slider.addEventListener("input", () => show(Number(slider.value)));
  for (const input of [all, find(".opacity")]) input.addEventListener("input", draw);
  scrollByWheel(stage, way => at + way >= 0 && at + way <= last, way => show(at + way));
  scrollByDrag(stage, slider, show);
  stage.addEventListener("pointermove", nameUnderPointer);
  stage.addEventListener("pointerleave", () => { under.hidden = true; });

  // The picture gives way to the canvas when the canvas has something to show.
  return show(at).then(() => {
    paint();
    for (const hidden of box.querySelectorAll("[hidden]:not(.under)")) hidden.hidden = false;
    for (const still of box.querySelectorAll(".needs, .stage img")) still.remove();
  });
}

if ("DecompressionStream" in window) {
  for (const box of document.querySelectorAll(".viewer")) startViewer(box);
}
