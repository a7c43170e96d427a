// The slices: HU and organs, unpacked one by one. Every number is packed as its difference from
// what the pixels to the left and above let expect, so that zlib finds small numbers.
function bytesOf(letters) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(letters);
  const text = atob(letters), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Into an array that is there, as garbage of a whole scan would fill the memory.
async function inflate(letters, bytes) {
  const packed = new Blob([bytesOf(letters)]).stream();
  const reader = packed.pipeThrough(new DecompressionStream("deflate")).getReader();
  for (let at = 0, part; !(part = await reader.read()).done; at += part.value.length) {
    bytes.set(part.value, at);
  }
}

// HU were rounded coarsely beyond those of soft tissue.
function unrounded(code, { step, soft, coarser }) {
  const soon = Math.max(soft[0] / step, Math.min(soft[1] / step, code));
  return step * (soon + coarser * (code - soon));
}

// Greys of 0 to 255 instead of HU come as JPEG.
async function inflateGreys(letters, greys, width, height) {
  const picture = await createImageBitmap(new Blob([bytesOf(letters)], { type: "image/jpeg" }));
  const tool = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  tool.drawImage(picture, 0, 0);
  const { data } = tool.getImageData(0, 0, width, height);
  for (let p = 0; p < greys.length; p++) greys[p] = data[4 * p];
}

function undoDifferences(bytes, hu, data) {
  const { step } = data, cols = data.shape[2];
  const count = hu.length;
  for (let p = 0, col = 0; p < count; p++) {
    const up = p < cols ? 0 : hu[p - cols];
    const guess = !col ? up : p < cols ? hu[p - 1] : (hu[p - 1] + up) >> 1;
    const folded = bytes[p] | bytes[count + p] << 8;
    hu[p] = guess + ((folded >>> 1) ^ -(folded & 1));
    if (++col === cols) col = 0;
  }
  if (step) for (let p = 0; p < count; p++) hu[p] = unrounded(hu[p], data);
}

// The volume fills from the slice that is looked at to both ends; `arrived` hears of each slice.
async function unpackVolume(data, volume, first, arrived) {
  const [count, rows, cols] = data.shape, size = rows * cols;
  const order = [...Array(count).keys()];
  order.sort((a, b) => Math.abs(a - first) - Math.abs(b - first));
  const bytes = new Uint8Array(2 * size);
  for (const z of order) {
    const start = z * size, end = start + size;
    if (data.masks) await inflateGreys(data.hu[z], volume.hu.subarray(start, end), cols, rows);
    else {
      await inflate(data.hu[z], bytes);
      undoDifferences(bytes, volume.hu.subarray(start, end), data);
    }
    for (const [i, letters] of [data.labels, ...data.others].entries()) {
      if (letters[z]) await inflate(letters[z], volume.masks[i].subarray(start, end));
      letters[z] = "";
    }
    data.hu[z] = "";
    volume.ready[z] = 1;
    arrived(z);
  }
}

// A plane of the volume as flat arrays. What lies down the picture is turned where up is the head.
const PLANES = {
  axial: { along: 0, down: 1, across: 2 },
  coronal: { along: 1, down: 0, across: 2 },
  sagittal: { along: 2, down: 0, across: 1 },
};

function cutPlane(volume, kind, index, mask, out) {
  const { along, down, across } = PLANES[kind];
  const { size, stride } = volume, width = size[across], height = size[down];
  for (let y = 0, q = 0; y < height; y++) {
    const deep = down ? y : height - 1 - y;
    let p = index * stride[along] + deep * stride[down];
    for (let x = 0; x < width; x++, q++, p += stride[across]) {
      out.hu[q] = volume.hu[p];
      out.mask[q] = mask[p] & 127;
      out.unsure[q] = mask[p] >> 7;
      out.truth[q] = volume.truth[p] & 127;
    }
  }
}

// The window as a table: what grey, as a pixel of a canvas, each HU has.
function greyTable(level, width) {
  const table = new Uint32Array(65536), black = level - width / 2;
  for (let i = 0; i < 65536; i++) {
    const share = ((i << 16 >> 16) - black) / Math.max(width, 1);
    const grey = Math.round(255 * Math.max(0, Math.min(1, share)));
    table[i] = (255 << 24 | grey << 16 | grey << 8 | grey) >>> 0;
  }
  return table;
}

// The borders between labels as lines along the pixels' edges, a path for each label.
function outlines(labels, width, height) {
  const paths = new Map();
  const line = (label, ...ends) => {
    if (!label) return;
    if (!paths.has(label)) paths.set(label, new Path2D());
    paths.get(label).moveTo(ends[0], ends[1]);
    paths.get(label).lineTo(ends[2], ends[3]);
  };
  const scan = (lines, length, label, draw) => {
    for (let i = 0; i <= lines; i++) {
      let start = 0, one = 0, other = 0;
      for (let j = 0; j <= length; j++) {
        const a = j < length && i > 0 ? label(i - 1, j) : 0;
        const b = j < length && i < lines ? label(i, j) : 0;
        if (a === one && b === other) continue;
        if (one !== other) for (const each of [one, other]) draw(each, i, start, j);
        [start, one, other] = [j, a, b];
      }
    }
  };
  scan(height, width, (y, x) => labels[y * width + x], (k, y, x, end) => line(k, x, y, end, y));
  scan(width, height, (x, y) => labels[y * width + x], (k, x, y, end) => line(k, x, y, x, end));
  return paths;
}

// The map of the stack: on which slices each organ is.
function drawMap(map, organs) {
  organs.forEach(({ color, counts }, i) => {
    for (let first = 0, z = 0; z <= counts.length; z++) {
      if (counts[z]) continue;
      const stripe = document.createElementNS(map.namespaceURI, "rect");
      const place = { x: first, y: 2 * i, width: z - first, height: 1.5, fill: color };
      for (const [name, value] of Object.entries(place)) stripe.setAttribute(name, value);
      if (z > first) map.append(stripe);
      first = z + 1;
    }
  });
}

function rgb(color) {
  return [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
}

// One plane on its canvas: a picture of the slice's own pixels below, drawn with the reader's zoom,
// and on it outlines, cross and distances as lines, which stay sharp.
function makePlane(viewer, box) {
  const kind = box.dataset.plane, { along, down, across } = PLANES[kind];
  const { data, volume, state } = viewer;
  const width = volume.size[across], height = volume.size[down];
  const mm = [data.spacing[across], data.spacing[down]];
  const canvas = box.querySelector("canvas"), context = canvas.getContext("2d");
  const layers = ["grey", "tint"].map(() => {
    const layer = Object.assign(document.createElement("canvas"), { width, height });
    const tool = layer.getContext("2d"), image = tool.createImageData(width, height);
    return { layer, tool, image, pixels: new Uint32Array(image.data.buffer) };
  });
  const cut = {
    hu: new Int16Array(width * height), mask: new Uint8Array(width * height),
    unsure: new Uint8Array(width * height), truth: new Uint8Array(width * height),
  };
  const plane = { kind, box, canvas, along, down, across, cut, view: { zoom: 1, x: 0, y: 0 } };
  let drawn = "", paths = new Map(), ratio = 1;

  // From the plane's pixels to those of the screen, and back.
  function fit() {
    const { clientWidth, clientHeight } = box;
    return Math.min(clientWidth / (width * mm[0]), clientHeight / (height * mm[1]));
  }
  function scale() { return fit() * plane.view.zoom; }
  plane.toScreen = ([x, y]) => [
    box.clientWidth / 2 + ((x - width / 2) * mm[0] - plane.view.x) * scale(),
    box.clientHeight / 2 + ((y - height / 2) * mm[1] - plane.view.y) * scale(),
  ];
  plane.toPixel = ([left, top]) => [
    ((left - box.clientWidth / 2) / scale() + plane.view.x) / mm[0] + width / 2,
    ((top - box.clientHeight / 2) / scale() + plane.view.y) / mm[1] + height / 2,
  ];
  plane.place = event => {
    const frame = canvas.getBoundingClientRect();
    return plane.toPixel([event.clientX - frame.left, event.clientY - frame.top]);
  };
  plane.toVoxel = ([x, y]) => {
    const at = [...state.at];
    at[across] = Math.floor(x);
    at[down] = down ? Math.floor(y) : height - 1 - Math.floor(y);
    return x >= 0 && y >= 0 && x < width && y < height ? at : null;
  };
  plane.ofVoxel = at => [at[across] + 0.5, (down ? at[down] : height - 1 - at[down]) + 0.5];
  plane.move = (left, top) => {
    plane.view.x -= left / scale();
    plane.view.y -= top / scale();
  };
  // The zoom keeps what is below the pointer where it is.
  plane.zoomBy = (factor, at = [box.clientWidth / 2, box.clientHeight / 2]) => {
    const fixed = plane.toPixel(at);
    plane.view.zoom = Math.max(0.5, Math.min(20, plane.view.zoom * factor));
    const [left, top] = plane.toScreen(fixed);
    plane.move(at[0] - left, at[1] - top);
  };
  plane.reset = () => { plane.view = { zoom: 1, x: 0, y: 0 }; };

  function paintGrey() {
    const [{ layer, tool, image, pixels }] = layers, table = viewer.greys;
    for (let q = 0; q < pixels.length; q++) pixels[q] = table[cut.hu[q] & 65535];
    tool.putImageData(image, 0, 0);
    context.drawImage(layer, 0, 0);
  }
  function paintTint() {
    const [, { layer, tool, image, pixels }] = layers, table = new Uint32Array(256);
    const alpha = Math.round(2.55 * state.opacity);
    for (const { id, color } of data.organs) {
      const [red, green, blue] = rgb(color);
      if (state.shown.has(id)) table[id] = (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;
    }
    const fill = state.organs && state.fill, unsure = state.unsure ? 0xe0ffffff : 0;
    if (state.errors) paintErrors(pixels, table);
    else for (let q = 0; q < pixels.length; q++) {
      pixels[q] = unsure && cut.unsure[q] ? unsure : fill ? table[cut.mask[q]] : 0;
    }
    tool.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, 0, 0);
    context.imageSmoothingEnabled = true;
  }
  // Wrong pixels alone: solid in the true organ's colour, striped in that of a false alarm.
  function paintErrors(pixels, table) {
    const opaque = color => color && (color | 0xff000000) >>> 0;
    for (let q = 0; q < pixels.length; q++) {
      const shown = cut.mask[q], truth = cut.truth[q], x = q % width, y = (q - x) / width;
      const striped = !truth && (x + y) % 4 > 1;
      pixels[q] = shown === truth ? 0 : striped ? 0xff000000 : opaque(table[truth || shown]);
    }
  }
  function stroke(path, color, thick) {
    context.lineWidth = thick * ratio;
    context.strokeStyle = color;
    context.stroke(path);
  }
  function paintOutlines(matrix) {
    for (const { id, color } of data.organs) {
      if (!paths.has(id) || !state.shown.has(id)) continue;
      const path = new Path2D();
      path.addPath(paths.get(id), matrix);
      stroke(path, color, state.fill ? 1.2 : 1.8);
    }
  }
  const dot = (x, y) => [x * ratio, y * ratio];
  function paintCross() {
    const [left, top] = plane.toScreen(plane.ofVoxel(state.at)), gap = 10;
    const path = new Path2D();
    for (const [x, y, u, v] of [[0, top, left - gap, top], [left + gap, top, box.clientWidth, top],
      [left, 0, left, top - gap], [left, top + gap, left, box.clientHeight]]) {
      path.moveTo(...dot(x, y));
      path.lineTo(...dot(u, v));
    }
    stroke(path, "#ffffff66", 1);
  }
  function paintDistances() {
    context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    for (const { from, to, text } of viewer.distancesOn(plane)) {
      const ends = [from, to].map(plane.toScreen), path = new Path2D();
      path.moveTo(...dot(...ends[0]));
      path.lineTo(...dot(...ends[1]));
      for (const [x, y] of ends) {
        path.moveTo(...dot(x + 3, y));
        path.arc(...dot(x, y), 3 * ratio, 0, 2 * Math.PI);
      }
      stroke(path, "#000c", 4);
      stroke(path, "#ffe45c", 2);
      const [x, y] = dot(ends[1][0] + 8, ends[1][1] - 8);
      context.lineWidth = 4 * ratio;
      context.strokeStyle = "#000c";
      context.strokeText(text, x, y);
      context.fillStyle = "#ffe45c";
      context.fillText(text, x, y);
    }
  }
  function bar() {
    const third = box.clientWidth / 3 / scale(), element = box.querySelector(".bar");
    element.hidden = !data.origins; // millimetres are not known
    const length = [100, 50, 20, 10, 5, 2, 1].find(n => n <= third) || 0.5;
    element.style.width = `${length * scale()}px`;
    element.textContent = `${length} mm`;
  }

  plane.paint = () => {
    ratio = window.devicePixelRatio || 1;
    const size = [box.clientWidth, box.clientHeight].map(n => Math.round(n * ratio));
    if (!size[0] || !size[1]) return;
    if (canvas.width !== size[0]) canvas.width = size[0];
    if (canvas.height !== size[1]) canvas.height = size[1];
    const index = state.at[along], key = `${index} ${viewer.version(plane)} ${state.mask} ${state.blink}`;
    if (drawn !== key) {
      cutPlane(volume, kind, index, volume.masks[state.mask], cut);
      paths = outlines(state.blink ? cut.mask : cut.truth, width, height);
      drawn = key;
    }
    const [left, top] = plane.toScreen([0, 0]), [right, low] = plane.toScreen([1, 1]);
    const matrix = new DOMMatrix([right - left, 0, 0, low - top, left, top].map(n => n * ratio));
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.setTransform(matrix);
    paintGrey();
    if (state.unsure || state.errors || state.organs && state.fill) paintTint();
    context.setTransform(1, 0, 0, 1, 0, 0);
    if (state.organs) paintOutlines(matrix);
    if (state.cross) paintCross();
    paintDistances();
    bar();
    canvas.dataset.slice = index;
  };
  return plane;
}

// What the mouse, fingers and the wheel do on a plane. The wheel scrolls the stack and is no trap: a
// page that is being scrolled goes on, and at the ends of the stack the wheel scrolls the page.
function listen(viewer, plane) {
  const { state } = viewer, { canvas, box, along } = plane;
  const fingers = new Map();
  let drag = null, turned = 0, pageMoved = -1000;

  addEventListener("scroll", event => { pageMoved = event.timeStamp; }, { passive: true });
  canvas.addEventListener("wheel", event => {
    const way = -Math.sign(event.deltaY), frame = canvas.getBoundingClientRect();
    if (event.ctrlKey) {
      event.preventDefault();
      const at = [event.clientX - frame.left, event.clientY - frame.top];
      plane.zoomBy(Math.exp(-event.deltaY / (event.deltaMode ? 8 : 300)), at);
      viewer.draw();
      return;
    }
    const next = state.at[along] + way;
    const ends = next < 0 || next >= viewer.volume.size[along];
    if (!way || event.timeStamp - pageMoved < 250 || ends) return;
    event.preventDefault();
    if (turned * event.deltaY < 0) turned = 0;
    turned += event.deltaMode ? 40 * Math.sign(event.deltaY) : event.deltaY;
    if (Math.abs(turned) < 40) return;
    turned = 0;
    viewer.show(along, next);
  }, { passive: false });

  const acts = {
    cross(event, start) {
      const at = plane.toVoxel(plane.place(event));
      if (event.pointerType === "touch") {  // sideways through the stack, a tap sets the cross
        const pixels = Math.max(4, box.clientWidth / viewer.volume.size[along]);
        const steps = Math.round((event.clientX - start.x) / pixels);
        if (event.type === "pointermove") viewer.show(along, start.at + steps);
        else if (event.type === "pointerup" && !start.moved && at) viewer.goTo(at);
      } else if (at && event.type !== "pointerup") viewer.goTo(at);
    },
    window(event, start) {
      const width = start.width + 2 * (event.clientX - start.x);
      viewer.setWindow(start.level - 2 * (event.clientY - start.y), width);
    },
    pan(event, start) {
      plane.move(event.clientX - start.last[0], event.clientY - start.last[1]);
      start.last = [event.clientX, event.clientY];
    },
    distance(event, start) {
      const place = plane.place(event);
      if (event.type === "pointerdown") start.line = viewer.newDistance(plane, place);
      else viewer.endDistance(plane, start.line, place);
    },
  };

  canvas.addEventListener("contextmenu", event => event.preventDefault());
  canvas.addEventListener("mousedown", event => event.preventDefault());
  canvas.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    box.focus({ preventScroll: true });
    const name = ["", "pan", "window"][event.button] || state.tool;
    const { clientX: x, clientY: y } = event, { level, width } = state;
    drag = { act: acts[name], x, y, last: [x, y], level, width, at: state.at[along], moved: false };
    if (name !== "window" && name !== "pan") drag.act(event, drag);
    viewer.draw();
  });
  // Two fingers zoom and move.
  function pinch(event) {
    const before = [...fingers.values()].map(f => [f.clientX, f.clientY]);
    fingers.set(event.pointerId, event);
    const after = [...fingers.values()].map(f => [f.clientX, f.clientY]);
    const frame = canvas.getBoundingClientRect();
    const apart = ends => Math.hypot(ends[0][0] - ends[1][0], ends[0][1] - ends[1][1]);
    const middle = ends => [0, 1].map(i => (ends[0][i] + ends[1][i]) / 2);
    const [from, to] = [middle(before), middle(after)];
    plane.move(to[0] - from[0], to[1] - from[1]);
    plane.zoomBy(apart(after) / Math.max(1, apart(before)), [to[0] - frame.left, to[1] - frame.top]);
    if (drag && drag.line) viewer.endDistance(plane, drag.line, drag.line.from);  // it was no line
    drag = null;
    viewer.draw();
  }
  canvas.addEventListener("pointermove", event => {
    if (fingers.size === 2 && fingers.has(event.pointerId)) return pinch(event);
    if (drag) {
      drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 5;
      drag.act(event, drag);
      viewer.draw();
    }
    viewer.read(plane.toVoxel(plane.place(event)));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, event => {
      if (drag && drag.act !== acts.pan && drag.act !== acts.window) drag.act(event, drag);
      fingers.delete(event.pointerId);
      drag = null;
      viewer.draw();
    });
  }
  canvas.addEventListener("pointerleave", () => viewer.read(null));
  canvas.addEventListener("dblclick", () => viewer.enlarge(plane.kind));
}

// The viewer. The screen follows from `state` alone; whatever changes it calls `draw`.
function startViewer(root) {
  const find = selector => root.querySelector(selector);
  const script = find("script"), data = JSON.parse(script.textContent);
  script.textContent = "";  // it is as large as the page
  const size = data.shape, count = size[0] * size[1] * size[2];
  const volume = {
    size, stride: [size[1] * size[2], size[2], 1], ready: new Uint8Array(size[0]),
    hu: new Int16Array(count).fill(-1024),
    // class of a voxel, and 128 more where it is unsure; the last mask is the truth
    masks: [data.labels, ...data.others].map(() => new Uint8Array(count)),
  };
  volume.truth = volume.masks.at(-1);
  const labelAt = (p, mask = state.mask) => volume.masks[mask][p];
  const state = {
    at: [...data.start], level: data.window[0], width: data.window[1], tool: "cross",
    organs: true, fill: true, opacity: 30, unsure: false, cross: true, errors: false,
    mask: 0, blink: 0,
    shown: new Set(data.organs.map(o => o.id)),
  };
  const viewer = { data, volume, state, greys: greyTable(state.level, state.width) };
  const stage = find(".stage"), readout = find(".readout"), status = find("[role=status]");
  let frame = 0, timer = 0, arrivals = 0, distances = [], pending = null;

  // How much of the volume a plane has seen; an axial slice is there or not.
  viewer.version = plane => plane.along ? arrivals : volume.ready[state.at[0]];
  const planes = [...root.querySelectorAll(".plane")].map(box => makePlane(viewer, box));
  // Keys and buttons act on the plane that had the focus last.
  let plane = planes[0];
  root.addEventListener("focusin", event => {
    plane = planes.find(p => p.box.parentElement.contains(event.target)) || plane;
  });

  function paint() {
    frame = 0;
    for (const plane of planes) plane.paint();
  }
  viewer.draw = () => { frame = frame || requestAnimationFrame(paint); };

  // Words: where a slice lies, what is below the pointer or the cross.
  const NAMES = ["Slice", "Row", "Column"];
  function sliceText(along) {
    const index = state.at[along];
    if (along) return `${NAMES[along]} ${index + 1} of ${size[along]}`;
    const names = data.organs.filter(o => o.counts[index]).map(o => o.name);
    return `${data.texts[index]}: ${names.join(", ") || "no organ"}`;
  }
  function millimetres(at) {
    const [z, row, col] = at;
    const [r, c] = [[row, 1], [col, 2]].map(([i, axis]) => {
      const shrink = data.source[axis] / size[axis];
      return (i + 0.5) * shrink - 0.5;
    });
    return data.origins[z].map((o, i) => o + r * data.down[i] + c * data.across[i]);
  }
  viewer.read = at => {
    const [z, row, col] = at || state.at, p = z * volume.stride[0] + row * size[2] + col;
    if (!volume.ready[z]) return;
    const organ = label => (data.organs.find(o => o.id === (label & 127)) || { name: "no organ" }).name;
    const words = [`${volume.hu[p]} ${data.masks ? "grey" : "HU"}`.replace("-", "−")];
    if (data.masks) words.push(...data.masks.map((name, i) => `${name}: ${organ(labelAt(p, i))}`));
    else words.push(organ(labelAt(p)));
    if (labelAt(p) > 127) words.push("unsure");
    if (data.origins && !data.masks) {
      const mm = millimetres([z, row, col]).map(v => v.toFixed(1).replace("-", "−"));
      words.push(`x ${mm[0]}, y ${mm[1]}, z ${mm[2]} mm`);
    }
    words.push(data.instances.length ? `instance ${data.instances[z]}` : `slice ${data.ranks[z] + 1}`);
    readout.textContent = words.join(" · ");
  };
  // A screen reader hears of a new slice half a second after the last step, unless the slider has
  // the focus and speaks for itself.
  function describe() {
    for (const plane of planes) {
      const text = sliceText(plane.along), slider = plane.box.parentElement.querySelector(".slice");
      slider.value = state.at[plane.along];
      slider.setAttribute("aria-valuetext", text);
      plane.canvas.setAttribute("aria-label", `${plane.kind} plane. ${text}`);
      plane.box.querySelector(".which").textContent = text.replace(/[:,].*/, "");
    }
    find(".where").textContent = sliceText(0);
    viewer.read(null);
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (!document.activeElement.matches(".slice")) status.textContent = sliceText(0);
    }, 500);
  }
  viewer.goTo = at => {
    state.at = at.map((v, axis) => Math.max(0, Math.min(size[axis] - 1, v)));
    describe();
    viewer.draw();
  };
  viewer.show = (axis, index) => viewer.goTo(state.at.map((v, i) => i === axis ? index : v));

  // Window and level, and the buttons that name some.
  viewer.setWindow = (level, width) => {
    state.level = Math.max(-1024, Math.min(3071, Math.round(level)));
    state.width = Math.max(1, Math.min(4096, Math.round(width)));
    viewer.greys = greyTable(state.level, state.width);
    find("[name=level]").value = state.level;
    find("[name=width]").value = state.width;
    for (const button of root.querySelectorAll("[data-window]")) {
      button.setAttribute("aria-pressed", button.dataset.window === `${state.level} ${state.width}`);
    }
    viewer.draw();
  };

  // Distances, each on the slice on which it was drawn.
  function length(plane, from, to) {
    const [a, b] = [from, to].map(([x, y]) => {
      const at = [...state.at];
      at[plane.across] = x - 0.5;
      at[plane.down] = plane.down ? y - 0.5 : size[0] - 0.5 - y;
      const low = Math.max(0, Math.min(size[0] - 2, Math.floor(at[0]))), rest = at[0] - low;
      if (size[0] < 2) return millimetres([0, at[1], at[2]]);
      const [m, n] = [low, low + 1].map(z => millimetres([z, at[1], at[2]]));
      return m.map((v, i) => v + rest * (n[i] - v));
    });
    return Math.hypot(...a.map((v, i) => v - b[i]));
  }
  viewer.newDistance = (plane, place) => {
    const line = { kind: plane.kind, index: state.at[plane.along], from: place, to: place, text: "" };
    distances.push(line);
    return line;
  };
  viewer.endDistance = (plane, line, place) => {
    line.to = place;
    line.text = data.origins ? `${length(plane, line.from, place).toFixed(1)} mm` : "";
    const same = Math.hypot(line.from[0] - place[0], line.from[1] - place[1]) < 0.5;
    if (same && line !== pending) distances = distances.filter(d => d !== line);
    else {
      clearTimeout(timer);
      status.textContent = readout.textContent = line.text;
    }
  };
  viewer.distancesOn = plane => distances.filter(
    d => d.kind === plane.kind && d.index === state.at[plane.along]);
  // By keys a distance goes from where the cross was to where it is.
  function distanceByKey(plane) {
    const place = plane.ofVoxel(state.at);
    if (pending && pending.kind === plane.kind) {
      viewer.endDistance(plane, pending, place);
      pending = null;
    } else pending = viewer.newDistance(plane, place);
  }

  // Organs and overlay.
  function toggle(id, on) {
    state.shown[on ? "add" : "delete"](id);
    const button = find(`.organ[data-id="${id}"]`);
    if (button) button.setAttribute("aria-pressed", on);
    viewer.draw();
  }
  function setOverlay(name, on) {
    state[name] = on;
    for (const input of root.querySelectorAll(`[name=${name}]`)) input.checked = on;
    viewer.draw();
  }
  function setOpacity(percent) {
    state.opacity = Math.max(0, Math.min(100, percent));
    find(".opacity").value = state.opacity;
    viewer.draw();
  }
  // The middle of an organ on a slice, as [row, col], or where the cross is.
  function middle(id, z) {
    let rows = 0, cols = 0, pixels = 0;
    for (let row = 0, p = z * volume.stride[0]; row < size[1]; row++) {
      for (let col = 0; col < size[2]; col++, p++) {
        if ((labelAt(p) & 127) !== id) continue;
        [rows, cols, pixels] = [rows + row, cols + col, pixels + 1];
      }
    }
    return pixels ? [rows, cols].map(sum => Math.round(sum / pixels)) : state.at.slice(1);
  }
  // The next slice with the organ in this direction, or with 0 the one where it is largest. The
  // other planes go through the organ's middle there.
  function findOrgan(id, way) {
    const { counts } = data.organs.find(o => o.id === id);
    let z = way ? state.at[0] + way : counts.indexOf(Math.max(...counts));
    while (way && z >= 0 && z < size[0] && !counts[z]) z += way;
    setOverlay("organs", true);
    toggle(id, true);
    if (z >= 0 && z < size[0]) viewer.goTo([z, ...middle(id, z)]);
  }

  function setTool(tool) {
    state.tool = tool;
    stage.dataset.tool = tool;
    for (const button of root.querySelectorAll("button[data-tool]")) {
      button.setAttribute("aria-pressed", button.dataset.tool === tool);
    }
  }
  // Which of several masks is filled; blinking, the first and the truth take turns.
  function setMask(index) {
    state.mask = index;
    for (const button of root.querySelectorAll("[data-mask]")) {
      button.setAttribute("aria-pressed", Number(button.dataset.mask) === index);
    }
    viewer.read(null);
    viewer.draw();
  }
  function blink() {
    clearInterval(state.blink);
    const next = () => setMask((state.mask + 1) % 2);
    state.blink = state.blink ? 0 : setInterval(next, 700);
    find("[data-act=blink]").setAttribute("aria-pressed", Boolean(state.blink));
    if (state.blink) next();
  }
  viewer.enlarge = kind => {
    stage.dataset.large = stage.dataset.large === kind ? "" : kind;
    plane = planes.find(p => p.kind === kind);
    viewer.draw();
  };
  function reset() {
    for (const plane of planes) plane.reset();
    viewer.setWindow(...data.window);
  }

  // Keys: single letters while the viewer or nothing has the focus; arrows move the cross in the
  // plane that has it.
  const help = find("dialog");
  const tools = { c: "cross", w: "window", p: "pan", d: "distance" };
  function moveCross(key) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    const at = [...state.at];
    if (step) {
      at[plane.across] += step[0];
      at[plane.down] += plane.down ? step[1] : -step[1];
    } else at[plane.along] += { PageUp: 1, PageDown: -1 }[key];
    viewer.goTo(at);
  }
  function keyed(event) {
    const { key, target } = event, letter = key.toLowerCase();
    const preset = find(`[data-window][data-key="${CSS.escape(letter)}"]`);
    const number = Number(key), inPlane = target.matches(".plane");
    if (inPlane && /^(Arrow|Page)/.test(key) && event.shiftKey) {
      const [x, y] = { Left: [40, 0], Right: [-40, 0], Up: [0, 40], Down: [0, -40] }[key.slice(5)] || [0, 0];
      plane.move(x, y);
    } else if (inPlane && /^(Arrow|Page)/.test(key)) moveCross(key);
    else if (key === "?") help.open ? help.close() : help.showModal();
    else if (key === "Escape") [distances, pending] = [[], null];
    else if (key === "+" || key === "=") plane.zoomBy(1.25);
    else if (key === "-") plane.zoomBy(0.8);
    else if (key === "0") reset();
    else if (key === ",") setOpacity(state.opacity - 10);
    else if (key === ".") setOpacity(state.opacity + 10);
    else if (key === "[" || key === "]") viewer.setWindow(state.level, state.width + (key === "]" ? 20 : -20));
    else if (key === "{" || key === "}") viewer.setWindow(state.level + (key === "}" ? 10 : -10), state.width);
    else if (data.organs.some(o => o.id === number)) toggle(number, !state.shown.has(number));
    else if (letter === "d" && inPlane && state.tool === "distance") distanceByKey(plane);
    else if (tools[letter]) setTool(tools[letter]);
    else if (letter === "o") setOverlay("organs", !state.organs);
    else if (letter === "f") setOverlay("fill", !state.fill);
    else if (letter === "x") setOverlay("cross", !state.cross);
    else if (letter === "u" && find("[name=unsure]")) setOverlay("unsure", !state.unsure);
    else if (letter === "e" && find("[name=errors]")) setOverlay("errors", !state.errors);
    else if (letter === "t" && data.masks) setMask((state.mask + 1) % data.masks.length);
    else if (letter === "v" && data.masks) blink();
    else if (letter === "m") viewer.enlarge(plane.kind);
    else if (preset) preset.click();
    else return;
    event.preventDefault();
    viewer.draw();
  }
  document.addEventListener("keydown", event => {
    const { target, altKey, ctrlKey, metaKey } = event;
    const typing = target.matches("input[type=number], select, textarea") || help.open && event.key !== "?";
    const ours = root.contains(target) || target === document.body;
    if (ours && !typing && !altKey && !ctrlKey && !metaKey) keyed(event);
  });

  root.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    const { id, go, tool, window: named, slice, act, mask } = button.dataset;
    if (slice) viewer.show(0, Number(slice)), setOverlay(data.masks ? "errors" : "unsure", true);
    else if (mask) setMask(Number(mask));
    else if (act === "blink") blink();
    else if (go) findOrgan(Number(id), Number(go));
    else if (id) toggle(Number(id), !state.shown.has(Number(id)));
    else if (tool) setTool(tool);
    else if (named) viewer.setWindow(...named.split(" ").map(Number));
    else if (act === "zoom-in" || act === "zoom-out") plane.zoomBy(act === "zoom-in" ? 1.25 : 0.8);
    else if (act === "reset") reset();
    else if (act === "help") help.showModal();
    else if (act === "large") viewer.enlarge(button.closest(".view").querySelector(".plane").dataset.plane);
    viewer.draw();
  });
  document.addEventListener("click", event => {
    const link = event.target.closest("a[data-organ]");
    if (!link) return;
    event.preventDefault();
    findOrgan(Number(link.dataset.organ), 0);
    stage.scrollIntoView({ block: "center" });
    planes[0].box.focus({ preventScroll: true });
  });
  for (const plane of planes) {
    const slider = plane.box.parentElement.querySelector(".slice");
    slider.addEventListener("input", () => viewer.show(plane.along, Number(slider.value)));
    listen(viewer, plane);
  }
  for (const input of root.querySelectorAll("[type=checkbox]")) {
    input.addEventListener("input", () => setOverlay(input.name, input.checked));
  }
  find(".opacity").addEventListener("input", event => setOpacity(Number(event.target.value)));
  for (const name of ["level", "width"]) {
    find(`[name=${name}]`).addEventListener("change", () => {
      viewer.setWindow(Number(find("[name=level]").value), Number(find("[name=width]").value));
    });
  }
  drawMap(find(".map"), data.organs);
  new ResizeObserver(viewer.draw).observe(stage);
  addEventListener("beforeprint", paint);

  // The picture gives way to the planes when the first slice is there.
  return unpackVolume(data, volume, state.at[0], z => {
    arrivals++;
    if (arrivals === 1) {
      for (const still of root.querySelectorAll(".needs, .still")) still.remove();
      for (const hidden of root.querySelectorAll(".live")) hidden.hidden = false;
      setTool("cross");
      viewer.setWindow(state.level, state.width);
      describe();
      paint();
    } else if (z === state.at[0]) describe();
    if (arrivals % 20 === 0 || z === state.at[0] || arrivals === size[0]) viewer.draw();
    if (arrivals === size[0]) root.dataset.ready = "";
  });
}

if ("DecompressionStream" in window) {
  for (const box of document.querySelectorAll(".viewer")) startViewer(box);
}
