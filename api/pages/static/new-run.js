// The form that starts a run: an estimate after each change, marks on changed fields, and only the fields that count.

const form = document.getElementById("new-run");
const PAUSE = 400; // milliseconds after the last change
const OFF = "off";

let timer;
let asked = 0;

function mark(field) {
  const control = field.querySelector("[data-start]");
  field.classList.toggle("changed", control.value.replaceAll("\r", "") !== control.dataset.start.replaceAll("\r", ""));
}

// Settings of another algorithm or of a part that is off, and prompts together with a set, are hidden and not sent.
function hideUnused() {
  const algorithm = form.elements["training.algorithm"].value;
  for (const field of form.querySelectorAll("[data-field]")) {
    const { algorithms, part } = field.dataset;
    const belongs = algorithms === "" || algorithms.split(" ").includes(algorithm);
    const top = part.split(".")[0];
    const isOff = top !== "" && form.elements[top]?.value === OFF;
    const isSet = field.dataset.field === "prompts" && form.elements.prompt_set.value !== "";
    field.hidden = !belongs || isOff || isSet;
    field.querySelector("[data-start]").disabled = field.hidden;
  }
  for (const group of form.querySelectorAll("[data-group]")) {
    const control = form.elements[group.dataset.group];
    const isOwn = control !== undefined && group.contains(control);
    group.classList.toggle("is-off", control?.value === OFF && !isOwn);
  }
}

function showErrors(fresh) {
  for (const field of form.querySelectorAll("[data-field]")) {
    const name = field.dataset.field;
    const control = form.elements[name];
    const error = field.querySelector(".field-error");
    error.textContent = fresh.getElementById(error.id)?.textContent ?? "";
    if (error.textContent) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
    control.setAttribute("aria-describedby", error.textContent ? `note-${name} ${error.id}` : `note-${name}`);
  }
}

async function estimate() {
  const number = ++asked;
  const panel = document.getElementById("estimate");
  try {
    const body = new URLSearchParams(new FormData(form));
    body.set("intent", "estimate");
    const response = await fetch(form.action, { method: "POST", body, headers: { Accept: "text/html" } });
    if (number !== asked) return; // there is a newer answer
    if (response.redirected || !response.ok) throw new Error();
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    const replacement = fresh.getElementById("estimate");
    if (number !== asked || replacement === null) return;
    if (!panel.isEqualNode(replacement)) panel.replaceChildren(...replacement.childNodes);
    showErrors(fresh);
  } catch {
    if (number === asked) panel.textContent = "The cost cannot be estimated now: the service does not answer.";
  }
}

form.addEventListener("input", (event) => {
  const field = event.target.closest("[data-field]");
  if (field === null) return;
  mark(field);
  hideUnused();
  clearTimeout(timer);
  timer = setTimeout(estimate, PAUSE);
});

// A problem's link leads into a group that may be closed.
form.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  const control = link && form.elements[link.hash.slice(1)];
  if (!control) return;
  event.preventDefault();
  control.closest("details")?.setAttribute("open", "");
  control.focus();
});

form.classList.add("has-script");
form.querySelectorAll("[data-field]").forEach(mark); // a browser that goes back keeps what was entered
hideUnused();
