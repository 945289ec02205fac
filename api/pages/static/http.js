// Requests to the API with the session's token, and short messages.

function meta(name) {
  return document.querySelector(`meta[name="${name}"]`)?.content ?? "";
}

export const caller = meta("caller");

export function send(path, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  const token = meta("csrf-token");
  if (token) headers["X-CSRF-Token"] = token;
  if (options.body) headers["Content-Type"] = "application/json";
  return fetch(path, { ...options, headers });
}

let timer;

export function toast(text, isError = false) {
  const element = document.getElementById("toast");
  element.textContent = text;
  element.className = isError ? "shown error" : "shown";
  clearTimeout(timer);
  timer = setTimeout(() => (element.className = ""), 6000);
}
