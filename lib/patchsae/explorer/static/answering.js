
// What the models answer: as it is stored, from the kernel, or from the model in the page.

const MOST = 3; // how far a latent can be turned up, as a factor

const isPlain = (change) => !change.gains.length && change.rest === 1;

/** What a state does to the latents, given the order in which top-k masks take them. */
function changeOf(state, order) {
  const gains = new Map(), rest = state.keep === "on" ? 0 : 1;
  if (state.keep) order.slice(0, state.k).forEach((s) => gains.set(s, state.keep === "on" ? 1 : 0));
  for (const [s, gain] of Object.entries(state.gains)) gains.set(Number(s), gain);
  return { gains: [...gains], rest, patch: state.here ? state.patch : null };
}

/** Return a function that asks for an answer; it gives null where one alone is stored and this is another. */
function answering(model, index, load) {
  const waiting = new Map();
  let number = 0;
  const heard = (message) => {
    const waits = waiting.get(message.answered);
    if (!waits) return;
    waiting.delete(message.answered);
    if (message.failed) waits.failed(new Error(message.failed));
    else waits.done(message.data);
  };
  model.on("msg:custom", heard);

  function ofKernel(image, m, change, classes) {
    return new Promise((done, failed) => {
      waiting.set(++number, { done, failed });
      model.send({ answer: number, image, model: m, ...change, names: classes });
    });
  }

  async function stored(image, group, m, change) {
    const [block, names] = await Promise.all([load(`answers-${image}`, readAnswers), load("names", (b) => b)]);
    const found = block.models[m];
    if (!found) return null;
    let row = 0;
    if (!isPlain(change)) {
      const [[s, gain] = []] = change.gains;
      if (change.gains.length !== 1 || gain !== 0 || change.rest !== 1 || change.patch !== null) return null;
      row = found.latent.indexOf(s) + 1;
      if (!row) return null;
    }
    const wide = found.class.length / found.true.length, here = (a) => [...a.subarray(row * wide, (row + 1) * wide)];
    const right = found.true[row];
    return { classes: here(found.class).map((c) => names.classes[group][c]), share: here(found.share),
      true: Number.isNaN(right) ? null : right };
  }

  async function inPage(engine, image, group, m, change, names) {
    const typed = names.length > 0, all = typed ? names : (await load("names", (b) => b)).classes[group];
    const found = await engine.answer(image, m, change, typed ? { names } : { group }, `${m}`);
    if (!found) return undefined; // a newer one is under way
    const label = typed ? null : index.gallery[image]?.label;
    return { classes: found.first.map((c) => all[c]), share: found.first.map((c) => found.share[c]),
      true: label >= 0 ? found.share[label] : null };
  }

  return {
    stop: () => model.off("msg:custom", heard),
    async ask(image, group, m, change, classes, engine) {
      const kept = classes.length ? null : await stored(image, group, m, change);
      if (kept && (isPlain(change) || (!index.live && !engine))) return kept;
      if (index.live) return ofKernel(image, m, change, classes);
      return engine ? inPage(engine, image, group, m, change, classes) : kept;
    },
  };
}

const readAnswers = (b) => ({ order: [...unpack(b.order)], models: b.models.map(unpackAll) });

const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

/** One model's answer as it is, and under a change beside it. */
function answerTable(title, before, after, label) {
  const cell = (answer, i) => {
    if (!answer) return element("td", {}, i ? "" : "not stored");
    const name = answer.classes[i], right = label !== null && name === label;
    return element("td", { style: `--share:${100 * (answer.share[i] ?? 0)}%`, ...(right ? { class: "right" } : {}) },
      ...(name === undefined ? [] : [element("span", {}, right ? `✓ ${name}` : name), element("span", {}, percent(answer.share[i]))]));
  };
  const lost = after && before.classes[0] !== after.classes[0];
  const rows = [0, 1, 2].filter((i) => before.classes[i] !== undefined).map((i) =>
    element("tr", {}, cell(before, i), ...(after === undefined ? [] : [cell(after, i)])));
  const heads = [element("th", { scope: "col" }, "as it is"),
    ...(after === undefined ? [] : [element("th", { scope: "col" }, lost ? "changed: another class" : "changed")])];
  return element("table", { class: lost ? "answer lost" : "answer" }, element("caption", {}, title),
    element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}
