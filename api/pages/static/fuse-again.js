// The form that fuses a pair again, and the new target next to the old one.

import { elementOf, get, run } from "./job.js";
import { sharpen } from "./page.js";

// What is no number or list of numbers stays a text, which the service accepts or refuses.
function valueOf(control) {
  const text = control.value.trim();
  if (text === "" && control.dataset.optional !== undefined) return null;
  const parts = text.split(",").map((part) => part.trim());
  const numbers = parts.map(Number);
  const areNumbers = text !== "" && parts.every((part) => part !== "") && numbers.every(Number.isFinite);
  if (!areNumbers) return text;
  const isList = control.closest("[data-pointer]").dataset.pointer === "/fusion/layers";
  return isList || numbers.length > 1 ? numbers : numbers[0];
}

function setAt(body, pointer, value) {
  const names = pointer.split("/").slice(1);
  const last = names.pop();
  let place = body;
  for (const name of names) place = place[name] ??= {};
  place[last] = value;
}

class FuseAgain extends HTMLElement {
  connectedCallback() {
    if (this.isPrepared) return;
    this.isPrepared = true;
    this.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      run(this, "/fusions", this.request(), (job) => this.showResult(job.id));
    });
  }

  request() {
    const body = JSON.parse(this.dataset.body);
    for (const field of this.querySelectorAll("[data-pointer]")) {
      setAt(body, field.dataset.pointer, valueOf(field.querySelector("input, select")));
    }
    return body;
  }

  async showResult(job) {
    const { data } = await get(`/pairs?job=${job}`);
    if (data.length === 0) throw new Error("Nothing was fused.");
    const comparison = await elementOf(`/pairs/${this.dataset.pair}/compare/${data[0].id}`, "comparison");
    const place = this.querySelector(".fused-again");
    place.replaceChildren(comparison);
    for (const picture of place.querySelectorAll("img")) {
      picture.addEventListener("load", () => sharpen(picture), { once: true });
    }
    place.scrollIntoView({ block: "nearest" });
  }
}

customElements.define("fuse-again", FuseAgain);
