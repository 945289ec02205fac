// Line charts as SVG: axes with labels and units, a legend, and the values under the pointer or the arrow keys.

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 230;
const MARGIN = { top: 10, right: 14, bottom: 40, left: 60 };
const COLOURS = 6;
const DIVERSITY = "diversity";
const SPLITS = { train: "training prompts", held_out: "held-out prompts", rollout: "samples of the round" };
const MOST_PROMPTS = 40;
const MOST_ABOVE = 3; // a longer legend is below its chart

function svg(name, attributes = {}, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function html(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const values = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
    values.push(Number(value.toPrecision(12)));
  }
  return values;
}

export function format(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return (size >= 10_000 || size < 0.001 ? value.toExponential(1) : Number(value.toPrecision(4)).toString()).replace("-", "−");
}

// `series`: [{ name, points: [[x, y]], quiet, colour }]. Points without a number are left out.
function lineChart({ title, note, xLabel, yLabel, series, integer, baseline }) {
  const figure = html("figure", "chart");
  figure.append(html("figcaption", "", title));
  if (note) figure.append(html("p", "note", note));

  const shown = series
    .map((line) => ({ ...line, points: line.points.filter(([, y]) => Number.isFinite(y)) }))
    .filter((line) => line.points.length > 0);
  if (shown.length === 0) return null;

  const loud = shown.filter((line) => !line.quiet);
  const legend = html("ul", "legend");
  const colour = (line) => `series-${line.colour ?? (loud.indexOf(line) % COLOURS) + 1}`;
  if (loud.length > 1 || loud[0]?.colour) loud.forEach((line) => legend.append(html("li", colour(line), line.name)));
  const frame = html("div", "chart-frame");
  const tip = html("div", "chart-tip");
  tip.hidden = true;
  frame.append(tip);
  if (loud.length > MOST_ABOVE) figure.append(frame, legend);
  else figure.append(legend, frame); // the space of a legend without entries aligns the charts of a row

  const draw = (width) => {
    frame.querySelector("svg")?.remove();
    const all = shown.flatMap((line) => line.points);
    const xs = all.map(([x]) => x);
    const ys = all.map(([, y]) => y).concat(baseline ?? []);
    const xRange = [Math.min(...xs), Math.max(...xs)];
    let yRange = [Math.min(...ys), Math.max(...ys)];
    const pad = (yRange[1] - yRange[0]) * 0.08 || Math.abs(yRange[0]) * 0.1 || 0.1;
    yRange = [yRange[0] - pad, yRange[1] + pad];
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const x = (value) => MARGIN.left + (xRange[1] === xRange[0] ? inner.width / 2 : ((value - xRange[0]) / (xRange[1] - xRange[0])) * inner.width);
    const y = (value) => MARGIN.top + inner.height - ((value - yRange[0]) / (yRange[1] - yRange[0])) * inner.height;

    const summary = loud.slice(0, 4).map((line) => `${line.name}: ${format(line.points[0][1])} to ${format(line.points.at(-1)[1])}`);
    const picture = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": `${title}. ${summary.join("; ")}` });
    for (const value of ticks(yRange[0], yRange[1], 4)) {
      picture.append(svg("line", { class: "grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      picture.append(svg("text", { class: "tick", x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    const xTicks = ticks(xRange[0], xRange[1], Math.max(3, Math.floor(inner.width / 60)));
    for (const value of integer ? xTicks.filter(Number.isInteger) : xTicks) {
      picture.append(svg("text", { class: "tick", x: x(value), y: HEIGHT - MARGIN.bottom + 18, "text-anchor": "middle" }, format(value)));
    }
    picture.append(svg("text", { class: "axis", x: MARGIN.left + inner.width / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
    picture.append(svg("text", { class: "axis", x: -(MARGIN.top + inner.height / 2), y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, yLabel));

    for (const line of shown) {
      const group = svg("g", { class: line.quiet ? "line quiet" : `line ${colour(line)}` });
      const points = line.points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(" ");
      group.append(svg("polyline", { points }));
      if (line.points.length <= 30 && !line.quiet) {
        for (const [px, py] of line.points) group.append(svg("circle", { cx: x(px), cy: y(py), r: 3 }));
      }
      if (line.quiet) group.append(svg("title", {}, line.name));
      picture.append(group);
    }
    const cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    picture.append(cursor);
    picture.addEventListener("pointermove", (event) => point(event.offsetX));
    picture.addEventListener("pointerleave", () => {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    });
    frame.append(picture);

    function point(offset) {
      const nearest = xs.reduce((best, value) => (Math.abs(x(value) - offset) < Math.abs(x(best) - offset) ? value : best));
      cursor.setAttribute("x1", x(nearest));
      cursor.setAttribute("x2", x(nearest));
      cursor.setAttribute("visibility", "visible");
      tip.hidden = false;
      tip.replaceChildren(html("b", "", `${xLabel.split(",")[0]} ${format(nearest)}`));
      loud.forEach((line) => {
        const found = line.points.find(([value]) => value === nearest);
        if (found) tip.append(html("span", colour(line), `${line.name}: ${format(found[1])}`));
      });
      tip.style.left = `${Math.min(Math.max(0, x(nearest) - 80), Math.max(0, width - 200))}px`;
    }
  };

  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== drawn) draw((drawn = width));
  }).observe(frame);
  return figure;
}

function scoreCharts({ scores, scorer }) {
  const scorers = [...new Set(scores.map((row) => row.scorer))].sort((a, b) => (b === scorer) - (a === scorer) || (a === DIVERSITY) - (b === DIVERSITY) || a.localeCompare(b));
  return scorers.map((name) => {
    const rows = scores.filter((row) => row.scorer === name);
    const series = Object.entries(SPLITS).map(([split, label]) => ({
      name: label,
      points: rows.filter((row) => row.split === split).map((row) => [row.training_images, row.mean]),
    }));
    const isReward = name === scorer;
    return lineChart({
      title: name === DIVERSITY ? "Diversity" : `Score: ${name}${isReward ? " (the reward)" : ""}`,
      xLabel: "images used for training",
      yLabel: name,
      series,
      integer: true,
    });
  });
}

const UPDATES = [
  { title: "Loss", label: "loss", lines: [["loss", "loss"]] },
  {
    title: "Log-ratio of both sides",
    label: "log p / p_old, mean",
    lines: [["preferred", "log_ratio_preferred"], ["rejected", "log_ratio_rejected"]],
    baseline: 0,
  },
  { title: "KL divergence from the policy before", label: "KL, per element", lines: [["KL", "kl"]] },
  { title: "Largest ratio", label: "p / p_old or its inverse", lines: [["ratio", "ratio_max"]] },
  { title: "Gradient norm", label: "L2 norm before clipping", lines: [["gradient norm", "grad_norm"]] },
];

const byUpdate = (updates, key) => updates.map((update) => [update.number, update[key] ?? NaN]);

function promptChart({ prompts, scorer }) {
  if (prompts === null) return html("p", "note", "This run has too many images for curves by prompt.");
  const rounds = Math.max(0, ...prompts.map((prompt) => prompt.points.length));
  if (rounds < 2) return null;
  const change = (prompt) => prompt.points.at(-1)[1] - prompt.points[0][1];
  const sorted = [...prompts].sort((a, b) => change(b) - change(a));
  const named = new Set([...sorted.slice(0, 3), ...sorted.slice(-3)]);
  const series = sorted.slice(0, MOST_PROMPTS).concat(sorted.slice(Math.max(MOST_PROMPTS, sorted.length - 3)));
  return lineChart({
    title: "Score by prompt",
    note: `Samples of each round. Named: the prompts that changed most, up and down${prompts.length > MOST_PROMPTS ? `; ${series.length} of ${prompts.length} prompts are shown` : ""}.`,
    xLabel: "round",
    yLabel: scorer,
    series: series.map((prompt) => ({ name: prompt.prompt, points: prompt.points, quiet: !named.has(prompt) })),
    integer: true,
  });
}

function updateCharts({ updates }) {
  const first = updates[0]?.round;
  const last = updates.at(-1)?.round;
  const note = updates.length === 0 ? "" : first === last ? `Round ${first}` : `Rounds ${first} to ${last}`;
  return UPDATES.map(({ title, label, lines, baseline }) => {
    const series = lines.map(([name, key]) => ({ name, points: byUpdate(updates, key) }));
    return lineChart({ title, note, xLabel: "update", yLabel: label, series, integer: true, baseline });
  });
}

// Charts with a line for each run: a chart for each scorer and split, and for each statistic of the updates.
export function comparedCharts(runs) {
  const isOf = (scorer, split) => (row) => row.scorer === scorer && row.split === split;
  const scorers = [...new Set(runs.flatMap((run) => run.scores.map((row) => row.scorer)))].sort();
  const ofScores = scorers.flatMap((scorer) =>
    Object.entries(SPLITS).map(([split, label]) =>
      lineChart({
        title: scorer === DIVERSITY ? "Diversity" : `Score: ${scorer}`,
        note: label[0].toUpperCase() + label.slice(1),
        xLabel: "images used for training",
        yLabel: scorer,
        series: runs.map((run, n) => ({ name: run.name, colour: n + 1, points: run.scores.filter(isOf(scorer, split)).map((row) => [row.training_images, row.mean]) })),
        integer: true,
      }),
    ),
  );
  const ofUpdates = UPDATES.flatMap(({ title, label, lines, baseline }) =>
    lines.map(([name, key]) => {
      const series = runs.map((run, n) => ({ name: run.name, colour: n + 1, points: byUpdate(run.updates, key) }));
      return lineChart({ title: lines.length > 1 ? `${title}: ${name}` : title, xLabel: "update", yLabel: label, series, integer: true, baseline });
    }),
  );
  return [...ofScores, ...ofUpdates].filter((figure) => figure !== null);
}

export async function charts() {
  const section = document.getElementById("charts");
  const response = await fetch(section.dataset.url, { headers: { Accept: "application/json" } });
  if (!response.ok) return;
  const data = await response.json();
  const figures = [...scoreCharts(data), promptChart(data), ...updateCharts(data)].filter((figure) => figure !== null);
  section.replaceChildren(...figures);
  section.hidden = figures.length === 0;
}
