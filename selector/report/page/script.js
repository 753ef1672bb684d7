"use strict";
// Tables: a click on a header sorts by it, another one the other way round, a third one as it was.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  table.querySelectorAll("thead th").forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const next = { null: "descending", descending: "ascending", ascending: null }[header.getAttribute("aria-sort")];
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      const rows = [...original];
      if (next) {
        header.setAttribute("aria-sort", next);
        rows.sort((a, b) => compareCells(a.cells[column], b.cells[column], next === "ascending" ? 1 : -1));
      }
      body.append(...rows);
      table.classList.toggle("sorted", Boolean(next));
    });
  });
}

function compareCells(a, b, sign) {
  const x = a.dataset.value, y = b.dataset.value;
  if (x !== undefined && y !== undefined) return sign * (Number(x) - Number(y));
  if (x !== undefined || y !== undefined) return x !== undefined ? -1 : 1; // cells without a figure stay below
  return sign * a.textContent.localeCompare(b.textContent);
}

// Answers, one by one: the image under every selector at one budget.
function explore(data) {
  const find = (id) => document.getElementById(id);
  const picks = { run: find("pick-run"), task: find("pick-task"), keep: find("pick-keep"), kind: find("pick-kind") };
  let place = 0;

  function fill(select, values) {
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select.value = before;
    select.closest("label").hidden = values.length < 2;
  }
  const unique = (values) => [...new Set(values)];
  const inTask = () => data.samples.filter((s) => s.run === picks.run.value && s.task === picks.task.value);

  // Samples of the task of which some answer at this budget changed in the way asked for.
  function chosen() {
    const kind = picks.kind.value;
    return inTask().filter((sample) => {
      const flips = sample.rows.filter((row) => row.keep === picks.keep.value).map((row) => row.flip);
      if (kind === "all") return true;
      return kind === "changed" ? flips.some((f) => f && f !== "same") : flips.includes(kind);
    });
  }

  function refill() {
    fill(picks.run, unique(data.samples.map((s) => s.run)));
    fill(picks.task, unique(data.samples.filter((s) => s.run === picks.run.value).map((s) => s.task)));
    fill(picks.keep, unique(inTask().flatMap((s) => s.rows.map((row) => row.keep)).filter(Boolean)));
    const telling = inTask().map((s) => s.tells_at).find(Boolean); // of the first sample on which selectors differ
    if (telling) picks.keep.value = telling;
    place = 0;
    show();
  }

  function show() {
    const samples = chosen();
    place = Math.max(0, Math.min(place, samples.length - 1));
    find("previous").disabled = place === 0;
    find("next").disabled = place >= samples.length - 1;
    const sample = samples[place];
    find("where").textContent = sample
      ? `Sample ${place + 1} of ${samples.length} shown here: ${sample.id}`
      : "No sample on this page fits.";
    const question = document.querySelector(".question"), panels = document.querySelector(".panels");
    question.replaceChildren();
    panels.replaceChildren();
    if (!sample) return;
    if (sample.question) question.append("Question: ", element("q", sample.question));
    if (sample.target !== undefined && sample.target !== null) question.append("  Right answer: ", element("q", sample.target));
    const image = data.images[sample.image], picture = new Image();
    const whole = { selector: "every token", tokens: sample.full_tokens, answer: sample.answer, correct: sample.correct, score: sample.score, kept: sample.kept };
    const rows = sample.rows.filter((row) => row.keep === picks.keep.value || row.keep === null);
    const canvases = [whole, ...rows].map((row) => panel(row, sample, image, panels));
    if (!image) return;
    picture.onload = () => canvases.forEach((draw) => draw && draw(picture));
    picture.src = image.data;
  }

  for (const name of ["run", "task"]) picks[name].addEventListener("change", refill);
  for (const name of ["keep", "kind"]) picks[name].addEventListener("change", () => { place = 0; show(); });
  find("previous").addEventListener("click", () => { place -= 1; show(); });
  find("next").addEventListener("click", () => { place += 1; show(); });
  refill();
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

const FLIPS = {
  same: "same words", right_to_wrong: "right → wrong", wrong_to_right: "wrong → right",
  wrong_to_wrong: "wrong → other wrong", right_to_right: "reworded, still right",
};

// Appends a figure of one row; returns what draws its canvases once the image is loaded, or null without an image.
function panel(row, sample, image, panels) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const name = row.keep ? `${row.selector}, keep ${row.keep}` : row.selector;
  caption.append(element("strong", name), element("span", ` ${row.tokens} of ${sample.full_tokens} tokens`, "small"));
  figure.append(caption);
  let draw = null;
  if (image && row.kept) {
    const based = image.base !== false; // a model of one view per image has no base view
    const kept = unpack(row.kept), share = Math.round((100 * row.tokens) / sample.full_tokens);
    const main = document.createElement("canvas"), base = document.createElement("canvas");
    [main.width, main.height] = image.size;
    base.width = base.height = 128;
    base.className = "base";
    main.setAttribute("role", "img");
    const boxes = (image.boxes || []).length ? ", the answer's evidence in a red box" : "";
    main.setAttribute("aria-label", `${name}: ${share}% of the visual tokens kept; kept patches clear, dropped ones veiled${boxes}`);
    base.setAttribute("role", "img");
    base.setAttribute("aria-label", `${name}: what is kept of the base view`);
    figure.append(main, ...(based ? [base] : []));
    draw = (picture) => { drawTiles(main, picture, image, kept); if (based) drawBase(base, picture, image, kept); };
  }
  if (row.answer !== undefined) {
    const said = document.createElement("p");
    const own = sample.scored_by !== undefined && row.score !== undefined;
    const mark = own ? `${sample.scored_by} ${Math.round(100 * row.score)}%`
      : row.correct === undefined ? "" : row.correct ? "✓ right" : "✗ wrong";
    said.append("“", element("span", row.answer, "said"), "” ", element("span", mark, row.correct ? "right" : "wrong"));
    figure.append(said);
  }
  const details = [];
  if (row.flip) details.push(FLIPS[row.flip]);
  if (row.evidence !== undefined) details.push(`evidence kept ${Math.round(100 * row.evidence)}%`);
  if (details.length) figure.append(element("p", details.join(" · "), "small"));
  panels.append(figure);
  return draw;
}

// Bits of the mask, tile by tile, the base view first.
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return (i) => Boolean((bytes[i >> 3] >> (7 - (i & 7))) & 1);
}

const VEIL = "rgba(34, 38, 54, 0.80)", LIGHT_VEIL = "rgba(226, 229, 238, 0.80)"; // light on a dark image

function drawTiles(canvas, picture, image, kept) {
  const pen = canvas.getContext("2d"), { xs, ys, tiles, grid } = image, patches = grid[0] * grid[1];
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = image.dark ? LIGHT_VEIL : VEIL;
  // Borders run over all tiles, bits of the mask tile by tile; tile 0 is the base view, if there is one.
  const first = image.base === false ? 0 : 1;
  for (let y = 0; y + 1 < ys.length; y++) for (let x = 0; x + 1 < xs.length; x++) {
    const tile = first + Math.floor(y / grid[0]) * tiles[1] + Math.floor(x / grid[1]);
    const patch = (y % grid[0]) * grid[1] + (x % grid[1]);
    const [left, top] = [Math.round(xs[x]), Math.round(ys[y])];
    if (!kept(tile * patches + patch)) pen.fillRect(left, top, Math.round(xs[x + 1]) - left, Math.round(ys[y + 1]) - top);
  }
  pen.strokeStyle = "rgba(255, 255, 255, 0.55)";
  pen.setLineDash([4, 3]);
  pen.beginPath();
  for (let t = 1; t < tiles[1]; t++) { pen.moveTo(xs[t * grid[1]], 0); pen.lineTo(xs[t * grid[1]], canvas.height); }
  for (let t = 1; t < tiles[0]; t++) { pen.moveTo(0, ys[t * grid[0]]); pen.lineTo(canvas.width, ys[t * grid[0]]); }
  pen.stroke();
  pen.setLineDash([]);
  for (const [x0, y0, x1, y1] of image.boxes || []) for (const [width, colour] of [[5, "#ffffff"], [2.5, "#eb3c28"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.strokeRect(x0 - 2, y0 - 2, x1 - x0 + 4, y1 - y0 + 4);
  }
}

function drawBase(canvas, picture, image, kept) {
  const pen = canvas.getContext("2d"), [rows, columns] = image.grid;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = image.dark ? LIGHT_VEIL : VEIL;
  const edge = (i, of) => Math.round((i * canvas.width) / of);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const [left, top] = [edge(x, columns), edge(y, rows)];
    if (!kept(y * columns + x)) pen.fillRect(left, top, edge(x + 1, columns) - left, edge(y + 1, rows) - top);
  }
}
