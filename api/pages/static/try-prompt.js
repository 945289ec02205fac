// Samples a prompt with a model and its base model, with the same seeds, and shows the images side by side.

import { get, run } from "./job.js";
import { sharpen } from "./page.js";

const whole = (text) => (/^\d+$/.test(text.trim()) ? Number(text) : text.trim());

class TryPrompt extends HTMLElement {
  connectedCallback() {
    this.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      run(this, "/evaluations", this.request(), (job) => this.showImages(job.id));
    });
  }

  request() {
    const value = (id) => this.querySelector(`#${id}`).value;
    return {
      label: "a prompt tried on the page of a model",
      models: JSON.parse(this.dataset.models),
      prompts: [{ text: value("try-text") }],
      samples_per_prompt: Number(value("try-count")),
      seed: whole(value("try-seed")),
      scorers: value("try-scorer") ? [value("try-scorer")] : null,
      resamples: 100,
    };
  }

  // A row for each seed, a column for each model.
  async showImages(job) {
    const { data } = await get(`/samples?job=${job}&limit=200`);
    const models = JSON.parse(this.dataset.models);
    const names = JSON.parse(this.dataset.names);
    const rows = [...new Set(data.map((sample) => sample.number))].sort((a, b) => a - b);
    const table = document.createElement("div");
    table.className = "strips";
    table.style.setProperty("--columns", models.length);
    for (const number of rows) {
      for (const [n, model] of models.entries()) {
        const sample = data.find((candidate) => candidate.number === number && candidate.model === model);
        if (sample) table.append(figure(sample, names[n]));
      }
    }
    const link = document.createElement("a");
    link.href = `/jobs/${job}`;
    link.textContent = "Scores and intervals of this comparison";
    this.querySelector(".tried").replaceChildren(table, link);
  }
}

function figure(sample, model) {
  const element = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const link = document.createElement("a");
  const image = document.createElement("img");
  const [score] = sample.scores;
  link.href = `/samples/${sample.id}`;
  link.textContent = `${model}: ${sample.number + 1}`;
  caption.append(link, score ? ` ${score.value.toFixed(3)}` : "");
  image.src = sample.image.replace("/artifacts/", "/images/");
  image.alt = `${model}, image ${sample.number + 1}`;
  image.addEventListener("load", () => sharpen(image), { once: true });
  element.append(caption, image);
  return element;
}

customElements.define("try-prompt", TryPrompt);
