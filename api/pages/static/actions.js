// Buttons that change a run: `<button data-action="/jobs/…/cancel">`. They use the API as every other client does.

import { send, toast } from "./http.js";
import { refresh } from "./page.js";

// A reload could discard the next click, if an event has already shown the new state.
async function refreshAround(button) {
  button.blur(); // a region with the focus is not replaced
  await refresh();
  button.disabled = false;
}

export function actions() {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-action]");
    if (button === null) return;
    if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;

    button.disabled = true;
    try {
      const options = { method: button.dataset.method || "POST" };
      if (button.dataset.body) options.body = button.dataset.body;
      const response = await send(button.dataset.action, options);
      if (!response.ok) throw new Error((await response.json()).detail);
      const target = response.headers.get("Location");
      if (target && target !== location.pathname) location.assign(target);
      else if (button.dataset.next) location.assign(button.dataset.next);
      else if (document.querySelector("[data-live-run=true]")) await refreshAround(button);
      else location.reload();
    } catch (error) {
      toast(error instanceof TypeError ? "The service cannot be reached; nothing was changed." : error.message, true);
      button.disabled = false;
    }
  });
}
