// The model in the page, seen from the page: it is loaded and started when first asked, and runs in a worker.

/** See API in the docstring of weights.py. `load` gives blocks, `report(text, share)` shows what is under way. */
export function startEngine(load, report = () => {}) {
  const waiting = new Map(), slots = new Map(), groups = new Map();
  let worker = null, facts = null, number = 0, opened = {}, closed = false;

  function ask(call, ...given) {
    if (closed) return Promise.reject(new Error("The model in this page has been closed."));
    return new Promise((done, failed) => {
      waiting.set(++number, { done, failed });
      worker.postMessage({ id: number, call, given });
    });
  }

  function heard({ data: { id, found, failed, share } }) {
    const waits = waiting.get(id);
    if (!waits) return;
    if (share !== undefined) return report("Reading the class names", share);
    waiting.delete(id);
    if (failed === undefined) waits.done(found);
    else waits.failed(new Error(failed));
  }

  function broken(event) {
    event.preventDefault?.();
    const error = new Error("The model cannot run in this browser: use a recent Chromium, Firefox or Safari.");
    waiting.forEach(({ failed }) => failed(error));
    waiting.clear();
  }

  /** Load a file part by part, and let the worker make a tower of it. */
  async function fetchFile(kind, what) {
    const { parts } = facts.files[kind];
    for (let i = 0; i < parts.length; i++) {
      report(`Loading ${what}`, i / parts.length);
      await load(`${kind}-${i}`, (block) => void ask("part", kind, i, block.text).catch(() => {}));
    }
    report(`Starting ${what}`, 1);
    await ask("open", kind);
    report("", null);
  }

  const once = (kind, what) =>
    (opened[kind] ??= (async () => {
      try {
        if (!facts) {
          const block = await load("engine", (found) => found);
          const url = URL.createObjectURL(new Blob([block.source], { type: "text/javascript" }));
          worker = new Worker(url);
          worker.onmessage = heard;
          worker.onerror = broken;
          facts = block.facts;
          await ask("begin", facts);
          URL.revokeObjectURL(url);
        }
        await fetchFile(kind, what);
      } catch (error) {
        report("", null);
        throw error;
      }
    })());
  const tower = () => once("tower", "the model");
  const words = async () => (await tower(), await once("words", "the text tower"));

  async function vectorsOf(m, { group, names, templates }) {
    if (names) return (await texts(m, names, templates)).vectors;
    const block = `vectors-${group}-${m}`;
    if (!groups.has(block)) groups.set(block, load(block, (b) => unpack(b.vectors)));
    return groups.get(block);
  }

  async function texts(m, names, templates) {
    await words();
    if (!facts.text) throw new Error("The text tower is not in this page, so that no class names can be typed.");
    return ask("texts", m, names.map(withoutEntities), templates ?? ["a photo of a {}."]).finally(() => report("", null));
  }

  async function answered(key, m, change, text) {
    await tower();
    return ask("answer", key, m, change, await vectorsOf(m, text));
  }

  return {
    async picture(key, source) {
      const name = (source.name ?? "") || "The picture";
      if (typeof source === "string") {
        const [kind, content] = source.slice(5).split(";base64,");
        source = new Blob([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], { type: kind });
      } else if (!(source instanceof Blob)) source = { data: source.data, width: source.width, height: source.height };
      await tower();
      return ask("picture", key, source, name);
    },
    activations: async (key, m) => (await tower(), ask("activations", key, m)),
    residual: async (key, m) => (await tower(), ask("residual", key, m)),
    embedding: async (key, m, change) => (await tower(), ask("embedding", key, m, change)),
    texts,
    /** Of several answers that wait in one slot only the newest is asked for; the others are null. */
    answer(key, m, change, text, slot = "") {
      return new Promise((done, failed) => {
        const wish = { done, failed, run: () => answered(key, m, change, text) };
        const busy = slots.get(slot);
        if (!busy) return serve(wish, slot);
        busy.next?.done(null);
        busy.next = wish;
      });
    },
    forget: async (key) => worker && ask("forget", key),
    close() {
      closed = true;
      worker?.terminate();
      waiting.forEach(({ failed }) => failed(new Error("The model in this page has been closed.")));
    },
  };

  function serve(wish, slot) {
    const place = { next: null };
    slots.set(slot, place);
    wish.run().then(wish.done, wish.failed).finally(() => {
      slots.delete(slot);
      if (place.next) serve(place.next, slot);
    });
  }
}

/** Read entities as open_clip does; what is typed is text, and never becomes part of the page. */
function withoutEntities(text) {
  const area = document.createElement("textarea");
  const read = (entity) => ((area.innerHTML = entity), area.value);
  return [0, 1].reduce((plain) => plain.replace(/&(#\d+|#x[\da-f]+|\w+);?/gi, read), text);
}
