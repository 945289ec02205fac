// The curves of two runs in the same charts.

import { comparedCharts } from "./charts.js";

const section = document.getElementById("charts");

async function read(number) {
  const response = await fetch(section.dataset[`run-${number}`], { headers: { Accept: "application/json" } });
  if (!response.ok) throw new Error(response.status);
  return { name: `${"AB"[number - 1]}: ${section.dataset[`title-${number}`]}`, ...(await response.json()) };
}

Promise.all([1, 2].map(read)).then((runs) => {
  section.replaceChildren(...comparedCharts(runs));
  section.hidden = section.childElementCount === 0;
});
