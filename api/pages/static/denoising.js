// The denoising steps of a pair: one tile of each strip at a time, with the mask of an item over the reference.

import { elementOf, follow, reason, start } from "./job.js";

const TINT = "rgb(255 0 144 / 70%)";

async function imageOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

// One mask of the grid in one colour, at the size of the grid.
function tinted(grid, x, y, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d");
  pen.drawImage(grid, x, y, width, height, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i]; // grey becomes opacity
  pen.putImageData(pixels, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = TINT;
  pen.fillRect(0, 0, width, height);
  return canvas;
}

class DenoisingSteps extends HTMLElement {
  connectedCallback() {
    if (this.isPrepared) return; // a pair that is shown again
    this.isPrepared = true;
    this.querySelector(".show-steps")?.addEventListener("click", () => this.make());
    if (!this.dataset.steps) return;

    this.steps = this.dataset.steps.split(" ").map(Number);
    this.addEventListener("input", () => this.draw());
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return; // it is hidden while the pair is shown blind
      observer.disconnect();
      this.load();
    }).observe(this);
  }

  get range() {
    return this.querySelector(".step");
  }

  // Images are loaded when they are on the screen for the first time.
  async load() {
    try {
      const figures = [...this.querySelectorAll("figure")];
      const strips = await Promise.all(figures.map((figure) => imageOf(figure.dataset.strip)));
      this.grid = this.dataset.mask ? await imageOf(this.dataset.mask) : null;
      this.sides = figures.map((figure, n) => ({ figure, strip: strips[n], canvas: figure.querySelector("canvas") }));
      for (const { canvas, strip } of this.sides) {
        canvas.width = strip.naturalWidth / this.steps.length;
        canvas.height = strip.naturalHeight;
      }
      this.draw();
    } catch {
      this.querySelector(".shown-step").textContent = "The images cannot be loaded.";
    }
  }

  draw() {
    const tile = Number(this.range.value);
    const text = `step ${this.steps[tile]} of ${this.dataset.numSteps}`;
    this.range.setAttribute("aria-valuetext", text);
    this.querySelector(".shown-step").textContent = text;
    for (const { figure, strip, canvas } of this.sides ?? []) {
      const pen = canvas.getContext("2d");
      canvas.classList.toggle("sharp", canvas.width * 1.5 < canvas.clientWidth);
      pen.drawImage(strip, tile * canvas.width, 0, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
      const mask = figure.dataset.role === "reference" ? this.drawMask(pen, canvas, tile) : "";
      canvas.setAttribute("aria-label", `${figure.dataset.role}, ${text}${mask}`);
    }
  }

  // The grid has a row for each item and one for the merged mask, a column for each step and one for all.
  drawMask(pen, canvas, tile) {
    const item = this.querySelector("#mask-item");
    if (this.grid === null || item.value === "") return "";
    const width = this.grid.naturalWidth / (this.steps.length + 1);
    const height = this.grid.naturalHeight / (Number(this.dataset.items) + 1);
    const time = this.querySelector("#mask-time");
    const column = time.value === "final" ? this.steps.length : tile;
    pen.imageSmoothingEnabled = false;
    const mask = tinted(this.grid, column * width, Number(item.value) * height, width, height);
    pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
    return `, mask: ${item.selectedOptions[0].text} at ${time.selectedOptions[0].text}`;
  }

  // A step back or forward. False if there is nothing to show.
  move(by) {
    if (!this.dataset.steps || this.offsetParent === null) return false;
    this.range.value = Number(this.range.value) + by;
    this.draw();
    return true;
  }

  async make() {
    const button = this.querySelector(".show-steps");
    const state = this.querySelector(".preview-state");
    const say = (text) => (state.textContent = text);
    button.disabled = true;
    try {
      say("Starting…");
      const job = await start("/previews", JSON.parse(this.dataset.body));
      const isWanted = () => this.isConnected;
      if ((await follow(job.id, say, isWanted)) === null) {
        button.disabled = false;
        return say("");
      }
      this.replaceWith(await elementOf(this.dataset.page, this.id));
    } catch (error) {
      say(reason(error));
      button.disabled = false;
    }
  }
}

customElements.define("denoising-steps", DenoisingSteps);

document.addEventListener("keydown", (event) => {
  const by = { ",": -1, ".": 1 }[event.key];
  const isTyping = event.target.matches("input:not([type=checkbox], [type=range]), select, textarea");
  const isOff = localStorage.getItem("dfusion.review.keys") === "off" || document.querySelector("dialog[open]");
  if (by === undefined || event.ctrlKey || event.metaKey || event.altKey || isTyping || isOff) return;
  if (document.querySelector("denoising-steps")?.move(by)) event.preventDefault();
});
