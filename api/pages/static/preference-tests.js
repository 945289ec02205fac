// The form for a new preference test, and the name of the rater, which this browser remembers.

import { send, toast } from "./http.js";

const RATER = "dfusion.review.reviewer";

document.getElementById("new-test")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { evaluation, name, questions } = event.target.elements;
  const body = { evaluation: evaluation.value };
  if (name.value.trim()) body.name = name.value.trim();
  if (questions.value) body.questions = Number(questions.value);
  try {
    const response = await send("/preference-tests", { method: "POST", body: JSON.stringify(body) });
    if (!response.ok) throw new Error((await response.json()).detail);
    location.assign(response.headers.get("Location"));
  } catch (error) {
    toast(error instanceof TypeError ? "The service cannot be reached; nothing was created." : error.message, true);
  }
});

const rate = document.getElementById("rate");
if (rate) {
  const { rater } = rate.elements;
  rater.value ||= localStorage.getItem(RATER) ?? "";
  rate.addEventListener("submit", () => localStorage.setItem(RATER, rater.value.trim()));
}
