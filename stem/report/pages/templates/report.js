"use strict";

const PLAY = "M5 3l12 7-12 7z";
const PAUSE = "M4 3h4.5v14H4zM11.5 3H16v14h-4.5z";
const DECIMALS = { dB: 2, "%": 1 };
const DOUBLINGS = 3; // of a difference, which is shown eight times as large

// The pictures of all panes, loaded; those of one frame are then drawn without a wait between them.
function loaded(panes) {
  return Promise.all(panes.map((pane) => Promise.all(pane.frames.map((uri) =>
    new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("a frame of " + pane.label + " cannot be read"));
      image.src = uri;
    })))));
}

const DIMMED = 0.7; // of the light outside a mask

// Outside the mask, which is white, a picture becomes darker.
function dim(canvas, mask) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "multiply";
  context.globalAlpha = DIMMED;
  context.drawImage(mask, 0, 0);
  context.globalAlpha = 1;
}

// The left share of a picture becomes another, up to a line.
function wipe(canvas, image, share) {
  const context = canvas.getContext("2d");
  const width = Math.round(canvas.width * share);
  if (width === 0) return;
  context.globalCompositeOperation = "source-over";
  context.drawImage(image, 0, 0, width, canvas.height, 0, 0, width, canvas.height);
  if (width === canvas.width) return;
  const line = Math.max(1, Math.round(canvas.width / 160));
  context.fillStyle = "white";
  context.fillRect(width - line, 0, line, canvas.height);
}

function draw(canvas, image, reference) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "copy";
  context.drawImage(image, 0, 0);
  if (!reference) return;
  context.globalCompositeOperation = "difference";
  context.drawImage(reference, 0, 0);
  context.globalCompositeOperation = "lighter";
  for (let time = 0; time < DOUBLINGS; time++) context.drawImage(canvas, 0, 0);
}

class Player {
  constructor(root, data, pictures) {
    Object.assign(this, { root, data, pictures, frame: -1, playing: false });
    this.count = pictures[0].length;
    this.canvases = [...root.querySelectorAll("canvas")];
    this.figures = [...root.querySelectorAll(".panes figure")].map((pane) => pane.querySelector(".figure"));
    this.names = [...root.querySelectorAll(".name")];
    this.range = root.querySelector("input[type=range]");
    this.check = root.querySelector("input[type=checkbox]");
    this.masked = root.querySelector(".masked");
    this.wiped = root.querySelector(".wiped");
    this.speed = root.querySelector("select");
    this.output = root.querySelector("output");
    this.now = root.querySelector(".now");
    this.button = root.querySelector("[data-action=play]");
    this.listen();
    for (const control of root.querySelectorAll(":disabled")) control.disabled = false;
    this.show(0);
  }

  listen() {
    const actions = { play: () => this.toggle(), back: () => this.step(-1), on: () => this.step(1) };
    for (const [name, act] of Object.entries(actions)) {
      this.root.querySelector(`[data-action=${name}]`).addEventListener("click", act);
    }
    this.root.querySelector(".panes").addEventListener("click", () => this.toggle());
    this.range.addEventListener("input", () => { this.pause(); this.show(Number(this.range.value)); });
    this.check.addEventListener("change", () => this.show(this.frame));
    if (this.masked) this.masked.addEventListener("change", () => this.show(this.frame));
    if (this.wiped) this.wiped.addEventListener("input", () => this.show(this.frame));
    this.speed.addEventListener("change", () => this.restart());
    this.root.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target === this.speed || event.target === this.wiped) return;
    const own = event.target.matches("button, input[type=checkbox]");
    const keys = {
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      Home: () => { this.pause(); this.show(0); },
      End: () => { this.pause(); this.show(this.count - 1); },
    };
    if (!own) keys[" "] = () => this.toggle(); // a focused button takes the space for itself
    if (event.key in keys) {
      event.preventDefault();
      keys[event.key]();
    }
  }

  // Every pane of a frame, within one task: the browser shows all of them at once, or none.
  show(frame) {
    this.frame = frame;
    const { panes, reference, wiped, every, num_frames: total } = this.data;
    const label = `frame ${frame * every + 1} of ${total}`;
    panes.forEach((pane, index) => {
      const differs = this.check.checked && pane.compared && index !== reference;
      draw(this.canvases[index], this.pictures[index][frame], differs && this.pictures[reference][frame]);
      if (this.masked && this.masked.checked && pane.mask !== null) dim(this.canvases[index], this.pictures[pane.mask][frame]);
      if (this.wiped && pane.compared && index !== wiped) wipe(this.canvases[index], this.pictures[wiped][frame], this.wiped.value / 100);
      this.names[index].textContent = differs ? `Δ ${pane.label}` : pane.label;
      this.canvases[index].dataset.frame = frame;
      this.canvases[index].setAttribute("aria-label", differs ? `${pane.label}, difference from ${panes[reference].label}, ${label}` : `${pane.label}, ${label}`);
      const value = pane.figures[frame];
      if (value !== undefined) {
        this.figures[index].textContent = typeof value === "number" ? `${value.toFixed(DECIMALS[pane.unit])} ${pane.unit}` : value;
      }
    });
    this.range.value = frame;
    this.range.setAttribute("aria-valuetext", label);
    this.output.value = label;
    if (this.now) {
      const x = this.count > 1 ? (1000 * frame) / (this.count - 1) : 500;
      this.now.setAttribute("x1", x);
      this.now.setAttribute("x2", x);
    }
  }

  step(by) {
    this.pause();
    this.show((this.frame + by + this.count) % this.count);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  play() {
    this.playing = true;
    this.mark("Pause", PAUSE);
    this.restart();
    const tick = (now) => {
      const passed = Math.max(0, (now - this.start) / 1000) * this.data.fps * Number(this.speed.value);
      const frame = (this.first + Math.floor(passed)) % this.count;
      if (frame !== this.frame) this.show(frame);
      this.request = requestAnimationFrame(tick);
    };
    this.request = requestAnimationFrame(tick);
  }

  pause() {
    this.playing = false;
    cancelAnimationFrame(this.request);
    this.mark("Play", PLAY);
  }

  // The clock starts again where the video stands.
  restart() {
    this.start = performance.now();
    this.first = this.frame;
  }

  mark(label, icon) {
    this.button.setAttribute("aria-label", label);
    this.button.title = label;
    this.button.querySelector("path").setAttribute("d", icon);
  }
}

for (const root of document.querySelectorAll(".player")) {
  const data = JSON.parse(root.querySelector("script").textContent);
  loaded(data.panes).then(
    (pictures) => new Player(root, data, pictures),
    (error) => { root.querySelector("output").value = error.message; },
  );
}
