
// The explorer. `model` is anywidget's in JupyterLab and a shim in the rendered page (page.js); either answers
// {want: name} with a block. What is shown is drawn from blocks here, so both show the same numbers; what models
// answer to a change comes from the kernel, or from the model in the page (engine.js), or is one that is stored.

function render({ model, el }) {
  const index = model.get("index"), inPage = Boolean(model.get("page")), [rows, columns] = index.grid, patches = rows * columns;
  const fetched = blocks(model), gallery = [...index.gallery], pictures = index.gallery.length;
  // one model alone has one row of bars, one list and one map, and is called by its title
  const alone = index.models.length === 1, plain = alone ? index.models[0] : "CLIP";
  const sides = alone ? ["clip"] : ["clip", "adapted"], named = alone ? sides : GROUPS;
  const ground = index.general ? `On ${index.general}, under ${plain}` : "";
  const opening = index.first && { image: index.first.image, adapted: index.first.adapted, latent: index.first.latent };
  const fresh = { image: 0, patch: null, adapted: alone ? 0 : 1, latent: null, opacity: 0.9, mask: true, classes: [], ...UNCHANGED };
  const limits = { grid: index.grid, latents: index.latents, pictures, models: index.models.length };
  // wish: what was chosen last. state: what is drawn, of which `shown` holds the data; it follows when all is loaded.
  const wish = { ...fresh, ...opening, ...(inPage && readAddress(location.hash, limits)) };
  let state = { ...wish }, shown = null, turn = 0, relist = wish.latent === null, drawnAt = 0, replace = true;
  const done = []; // changes that can be undone
  let engine = null, said = "";
  const own = new Map(); // pictures of the reader's that the page's model took: number to pixels
  const load = (name, decode) => ownBlock(name) ?? fetched(name, decode);
  const answers = answering(model, index, load), canRun = () => index.live || (inPage && index.engine);
  const canType = () => index.live || (inPage && Boolean(index.engine?.text?.some(Boolean)));
  const referenceLines = references(index, fetched);
  const page = frame({ index, alone, plain, sides, named, canRun: Boolean(canRun()), canType: canType() });
  const { root, at } = page;
  el.append(root);
  const say = (text, wrong = false) => {
    said = text;
    at("message").textContent = text;
    at("message").classList.toggle("wrong", wrong);
  };
  const failed = (error) => say(error.message, true);
  const adaptedName = () => index.models[state.adapted];
  say("Loading the data …");

  /** Start the page's model at its first use; null where there is none or it cannot run model m. */
  function running(m) {
    if (index.live || !inPage || !index.engine?.models[m]) return null;
    engine ??= startEngine(fetched, (text, share) => {
      at("progress").textContent = text && (share === null ? text : `${text} ${Math.round(100 * share)} %`);
    });
    return engine;
  }

  /** Blocks of a picture that the page's own model took. */
  function ownBlock(name) {
    const [, kind, number, m] = name.match(/^(image|acts|answers)-(\d+)-?(\d*)$/) ?? [];
    if (!own.has(Number(number))) return null;
    if (kind === "image") return Promise.resolve(own.get(Number(number)));
    return kind === "acts" ? running(Number(m)).activations(Number(number), Number(m)) : Promise.resolve({ order: [], models: [] });
  }

  /** Have the page's model take a picture of the gallery, once; those of the reader's it has. */
  const taken = new Map();
  async function readyEngine(number, m) {
    const found = running(m);
    if (!found || own.has(number)) return found;
    if (!taken.has(number)) {
      taken.set(number, fetched(`image-${number}`, (b) => picture(b.picture)).then((seen) => found.picture(number, seen.src)));
      taken.get(number).catch(() => taken.delete(number));
    }
    await taken.get(number);
    return found;
  }

  /** Draw what is wished for; `anew` if the lists may change, and with them the chosen latent. */
  function change(what, anew = false, quietly = false) {
    Object.assign(wish, what);
    relist ||= anew; // until lists are drawn, however many wishes come before
    replace = quietly;
    at("number-message").textContent = "";
    return update();
  }

  /** Change what is done to latents, so that it can be undone; one drag of a slider is one step. */
  let lastEdit = "";
  function edit(what, kind = "") {
    const now = Object.fromEntries(Object.keys(UNCHANGED).map((key) => [key, wish[key]]));
    if (!kind || kind !== lastEdit) done.push(now);
    lastEdit = kind;
    change(what, false, Boolean(kind));
  }

  const turnLatent = (s, gain, kind = "") => {
    if (s === null) return;
    const gains = { ...wish.gains };
    if (gain === 1) delete gains[s];
    else gains[s] = gain;
    edit({ gains }, kind);
  };

  function undo() {
    lastEdit = "";
    if (done.length) change(done.pop());
  }

  /** Take back a wish whose data did not come: what is drawn and the controls agree again. */
  function takeBack() {
    Object.assign(wish, state);
    relist = false;
    controls();
  }

  function controls() {
    at("opacity").value = state.opacity;
    at("mask").checked = state.mask;
    if (!alone) at("model").value = state.adapted;
    if (canType()) at("classes").value = state.classes.join(", ");
    const gain = state.gains[state.latent] ?? 1;
    at("gain").value = gain;
    at("gain-value").textContent = `× ${gain}`;
    for (const name of ["off", "gain"]) at(name).disabled = state.latent === null;
    at("off").textContent = gain === 0 ? "Switch it on again" : "Switch it off";
    at("off").setAttribute("aria-pressed", gain === 0);
    at("here").checked = state.here;
    at("here").disabled = state.patch === null && !state.here;
    at("keep").value = state.keep;
    at("k").value = state.k;
    at("undo").disabled = !done.length;
    at("reset").disabled = !Object.keys(state.gains).length && !state.keep && !state.here;
    at("whole").disabled = state.patch === null;
  }

  function pickPatch(x, y) {
    const within = (share, cells) => Math.max(0, Math.min(Math.floor(share * cells), cells - 1));
    change({ patch: within(y, rows) * columns + within(x, columns) }, true);
  }

  function movePatch(event) {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Escape") return change({ patch: null, here: false }, true);
    if (!move) return;
    event.preventDefault();
    if (wish.patch === null) return change({ patch: 0 }, true);
    const row = Math.floor(wish.patch / columns) + move[0], column = (wish.patch % columns) + move[1];
    if (row >= 0 && row < rows && column >= 0 && column < columns)
      change({ patch: row * columns + column }, true);
  }

  function pickNumber(input) {
    const wanted = input.valueAsNumber, typed = input.validity.badInput ? "of this name" : input.value;
    if (Number.isInteger(wanted) && wanted >= 0 && wanted < index.latents) return change({ latent: wanted });
    input.value = state.latent ?? ""; // what is shown below
    at("number-message").textContent = typed &&
      `There is no latent ${typed}: choose a whole number from 0 to ${index.latents - 1}.`;
    at("number-message").scrollIntoView({ block: "nearest" });
  }

  async function update() {
    const mine = ++turn, { image: number, adapted } = wish, activations = (m) => load(`acts-${number}-${m}`, unpackAll);
    let loaded;
    try {
      loaded = await Promise.all([
        load(`image-${number}`, (b) => picture(b.picture)), fetched("latents", unpackAll), fetched("names", (b) => b),
        fetched("labels", readLabels), load(`answers-${number}`, readAnswers), activations(0), ...(alone ? [] : [activations(adapted)]),
      ]);
    } catch (error) {
      if (mine !== turn) return;
      if (shown) takeBack();
      return failed(error);
    }
    if (mine !== turn) return; // something newer is under way
    const [seen, latents, { sets: names }, labels, { order }, ...found] = loaded;
    if (said.startsWith("Loading")) say("");
    shown = { seen, found, latents, names, labels, order, ...(shown?.image === number ? { answers: shown.answers } : {}), image: number };
    shown.values = shown.found.map((found) => {
      const level = [levels(found, null, index.latents)];
      return wish.patch === null ? level : [...level, levels(found, wish.patch, index.latents)];
    });
    shown.groups = groupLatents(shown.values, latents.left_out, index.config.top);
    const listed = GROUPS.flatMap((g) => shown.groups[g].map(([s]) => s));
    if (relist && !listed.includes(wish.latent)) wish.latent = listed[0] ?? null;
    relist = false;
    state = { ...wish };
    draw();
    keepAddress();
    await Promise.all([drawReferences(mine), drawAnswers(mine), drawNear(mine)]);
    if (mine === turn) root.dataset.drawn = JSON.stringify(state);
  }

  function keepAddress() {
    const text = `#${addressOf(state, columns)}`;
    if (!inPage || own.has(state.image) || text === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", text);
    replace = false;
  }

  function fromAddress() {
    const found = readAddress(location.hash, limits);
    if (!found) return;
    done.length = 0;
    change({ ...fresh, ...found }, found.latent === null, true);
  }

  const colours = () => {
    const style = getComputedStyle(root), read = (name) => style.getPropertyValue(`--px-${name}`).trim();
    return Object.fromEntries(["back", "text", "muted", "line", "wrong", ...GROUPS].map((name) => [name, read(name)]));
  };

  function draw() {
    drawnAt = root.clientWidth;
    const pane = at("squares").clientWidth, wide = at("detail").clientWidth - 30, row = drawnAt < 760; // as in explorer.css
    const side = row ? Math.floor((pane - 12 * sides.length) / (sides.length + 1)) : Math.floor(0.64 * (pane - 8));
    const small = row ? side : pane - 8 - side;
    drawGallery();
    drawImage(side);
    controls();
    ["image", "patch"].forEach((level, i) => showBars(level, i, wide));
    drawLegend();
    named.forEach(drawList);
    at("heading").textContent = state.latent === null ? "No latent is active" : `Latent ${state.latent}`;
    at("number").value = state.latent ?? "";
    at("strength").textContent = `${Math.round(100 * state.opacity)} %`;
    const maps = shown.found.map((found) => patchMap(found, state.latent, patches));
    const peak = Math.max(...maps.flatMap((map) => [...map])); // one for both, so that strengths compare
    maps.forEach((map, i) => drawMap(sides[i], map, peak, small, i));
    at("scale").textContent = peak > 0
      ? `Yellow where the latent fires, grey where it is silent; ${alone ? "" : "in both pictures "}full yellow is an ` +
        `activation of ${format(peak)}.`
      : `The latent fires on no patch of this image${alone ? "" : " under either model"}.`;
    drawName();
    drawStatistics();
    showScatter(Math.min(420, wide));
  }

  function drawGallery() {
    const buttons = [...at("gallery").querySelectorAll("button")];
    buttons.forEach((b) => b.setAttribute("aria-pressed", Number(b.dataset.number) === state.image));
    oneStop(buttons);
  }

  function drawImage(side) {
    const target = at("image"), context = sized(target, side, side), { title, set } = gallery[state.image];
    context.drawImage(shown.seen, 0, 0, side, side);
    const row = Math.floor(state.patch / columns), column = state.patch % columns;
    if (state.patch === null) return (at("where").textContent = `${title} (${set}). No patch is chosen: click one.`);
    framePatch(context, state.patch, index.grid, side);
    at("where").textContent = `${title} (${set}). Patch: row ${row + 1}, column ${column + 1}.`;
  }

  function showBars(level, i, width) {
    const target = at(`bars-${level}`), values = shown.values.map((v) => v[i]);
    target.onclick = null;
    if (!values[0]) {
      at(`title-${level}`).textContent = "Patch: none is chosen";
      const context = sized(target, width, barsHeight(index.models.length));
      context.fillStyle = colours().text;
      return context.fillText("Click the image to see one patch's activations.", 36, alone ? 53 : 82, width - 40);
    }
    at(`title-${level}`).textContent = (level === "image" ? "Whole image (mean)" : "Patch") +
      `, latents 0 to ${count(index.latents - 1)}`;
    const listed = values.map((v) => v.map((x, s) => (shown.latents.left_out[s] ? 0 : x)));
    const nearest = drawBars(target, {
      values: listed, groups: shown.groups, chosen: state.latent, names: alone ? [plain] : [plain, adaptedName()],
      colours: colours(), width,
    });
    tell(target, (event) => nearest(event.offsetX), (s) => values.map((v) => format(v[s])).join(" and "));
  }

  /** Make a chart answer a click with a latent, and the pointer with its exact values. */
  function tell(target, nearest, values) {
    target.onclick = (event) => {
      const near = nearest(event);
      if (near !== null) change({ latent: near });
    };
    target.onmousemove = (event) => {
      const near = nearest(event);
      target.title = near === null ? "" : `latent ${near} ${nameShort(nameOf(shown.labels, near))}: ${values(near)}`;
    };
  }

  const groupName = (g) => alone ? "Strongest latents"
    : ({ common: "Common", clip: "Only CLIP", adapted: `Only ${adaptedName()}` })[g];

  function drawLegend() {
    const key = (g, text) => element("span", { style: `--bar:var(--px-${g})` }, text);
    at("legend").replaceChildren(...named.map((g) => key(g, groupName(g))), key("muted", alone ? "not listed" : "on no list"));
  }

  /** A button that chooses a latent: its number and name, and what it is listed by. */
  function latentButton(s, value, share, attributes = {}) {
    const name = nameOf(shown.labels, s), gain = state.gains[s] ?? 1;
    return element("button", {
      type: "button", class: gain === 0 ? "latent off" : "latent", "data-latent": s, "data-value": value,
      "aria-pressed": s === state.latent, style: `--share:${share}%`, onclick: () => change({ latent: s }), ...attributes,
    }, element("span", {}, `latent ${s}`, ...(name ? [" ", element("i", name.proven ? {} : { class: "unproven" }, nameShort(name))] : [])),
      element("span", {}, `${gain === 1 ? "" : gain === 0 ? "off · " : `× ${gain} · `}${format(value)}`));
  }

  function drawList(group) {
    const entries = shown.groups[group], focus = at(group).contains(document.activeElement);
    at(`title-${group}`).textContent = `${groupName(group)} (${entries.length})`;
    at(group).setAttribute("aria-label", groupName(group));
    const peak = Math.max(1e-12, ...GROUPS.flatMap((g) => shown.groups[g].map(([, v]) => v)));
    const buttons = entries.map(([s, value]) => latentButton(s, value, (100 * value) / peak));
    at(group).replaceChildren(...(buttons.length ? buttons : [element("p", { class: "small" }, "none")]));
    oneStop(buttons);
    if (focus) buttons.find((b) => b.tabIndex === 0)?.focus({ preventScroll: true });
  }

  function drawMap(name, map, peak, side, i) {
    const context = sized(at(`map-${name}`), side, side);
    context.drawImage(shown.seen, 0, 0, side, side);
    if (state.latent !== null) overlay(context, map.map((v) => v / (peak || 1)), index.grid, side, state.opacity);
    if (state.patch !== null) framePatch(context, state.patch, index.grid, side);
    const texts = shown.values[i].map((v, k) => `${k ? "patch" : "image"} ${format(v[state.latent])}`);
    at(`caption-${name}`).parentElement.style.width = `${side}px`;
    at(`caption-${name}`).textContent = `${i ? adaptedName() : plain}: ${texts.join(", ")}`;
  }

  function drawName() {
    const name = nameOf(shown.labels, state.latent);
    at("name").hidden = !index.named || state.latent === null;
    at("name").textContent = proofOf(name);
    at("name").classList.toggle("unproven", !name?.proven);
  }

  function drawStatistics() {
    const l = shown.latents, s = state.latent, tau = index.tau && Number(index.tau.toPrecision(3));
    if (!l.image_frequency || s === null) return at("statistics").replaceChildren("There are no statistics of this latent.");
    const children = [statisticsTable(l, s, tau, ground)];
    if (l.left_out[s]) children.push(element("p", { class: "small" }, `Left out of the lists: f (${tau}) is above ${index.config.frequent}.`));
    at("statistics").replaceChildren(...children);
  }

  function showScatter(width) {
    const target = at("scatter"), latents = shown.latents;
    target.hidden = !latents.image_frequency;
    if (target.hidden) return;
    const nearest = drawScatter(target, { latents, chosen: state.latent, colours: colours(), width });
    tell(target, (event) => nearest(event.offsetX, event.offsetY), (s) =>
      `f ${format(latents.image_frequency[s])}, a ${format(latents.mean_activation[s])}, e ${format(latents.entropy[s])}`);
  }

  /** Show what each model answers, as it is and, if anything is changed, with the change. */
  async function drawAnswers(mine) {
    const { image: number } = state, { group = 0, label = -1 } = gallery[number], typed = state.classes;
    const picks = alone ? [0] : [0, state.adapted];
    at("first").textContent = firstSentence();
    if (!index.groups[group].asked && !typed.length)
      return at("answers").replaceChildren(element("p", { class: "small" },
        canType() ? "There is one class alone to choose from: type class names below." : "There is one class alone to choose from."));
    const keepOrder = shown.order.length ? shown.order : strongest(shown.values[0][0], shown.latents.left_out, 100);
    const wanted = changeOf(state, keepOrder), changed = !isPlain(wanted), none = { gains: [], rest: 1, patch: null };
    at("keep-note").textContent = state.keep && `The first ${state.k} of ${shown.order.length
      ? "this class's ranking, as in Figure 5" : "this picture's strongest latents"}.`;
    let pairs;
    try {
      const ask = async (m, what) => {
        const able = changed || typed.length || own.has(number) ? await readyEngine(number, m) : null;
        return answers.ask(number, group, m, what, typed, able);
      };
      pairs = await Promise.all(picks.map(async (m) => {
        const before = await ask(m, none);
        if (mine !== turn) return [m]; // what is asked now would take the place of something newer
        return [m, before, changed ? await ask(m, wanted) : undefined];
      }));
    } catch (error) {
      if (mine !== turn) return;
      return at("answers").replaceChildren(element("p", { class: "wrong", role: "alert" }, error.message));
    }
    if (mine !== turn || pairs.some(([, before, after]) => !before || (changed && after === undefined))) return;
    shown.answers = pairs;
    const truth = label >= 0 && !typed.length ? gallery[number].title : null;
    const missing = changed && pairs.some(([, , after]) => after === null);
    at("answers").replaceChildren(
      element("p", { class: "small", "data-part": "truth" }, truth === null ? "The true class is not known." : `True class: ${truth}`),
      element("div", { class: "both" }, ...pairs.map(([m, before, after]) => answerTable(index.models[m], before, after, truth))),
      ...(missing ? [element("p", { class: "small" }, "This answer is not stored: without a model in the page, only those " +
        `without one of the ${index.config.answered} strongest latents of the picture are. JupyterLab computes any.`)] : []));
  }

  function firstSentence() {
    const { image, adapted, latent, only, lost } = index.first ?? {};
    if (state.image !== image || state.adapted !== adapted || Object.keys(state.gains).length) return "";
    const who = index.models[adapted];
    return (only ? `${who} gets this picture right and ${plain} does not. ` : "") +
      (lost ? `Switch latent ${latent} off: ${who} loses its answer.` : `Switch latent ${latent} off and see what is left of the answer.`);
  }

  async function drawNear(mine) {
    const s = state.latent;
    if (s === null) return;
    const near = await fetched(`near-${Math.floor(s / index.chunk)}`, readNear).catch(() => null);
    if (mine !== turn) return;
    for (const kind of ["decoder", "together"]) {
      const found = near?.[kind] ? nearest(near, kind, s, index.chunk, index.latents) : [];
      at(`near-${kind}`).replaceChildren(...(found.length ? found.map(([other, v]) => latentButton(other, v, 100 * v))
        : [element("p", { class: "small" }, "none")]));
      oneStop([...at(`near-${kind}`).querySelectorAll("button")]);
    }
  }

  function search(typed) {
    const found = searchNames(shown.labels, typed);
    at("found").replaceChildren(...found.map((s) => latentButton(s, shown.labels.auroc[s], 0)));
    oneStop([...at("found").querySelectorAll("button")]);
    at("found-note").textContent = !typed.trim() ? "" : found.length ? "Sorted by proof; the number is the name's AUROC."
      : `No latent is called “${typed.trim()}”.`;
  }

  function nextLatent() {
    const found = nextOfClass(shown.labels, shown.names, index, gallery[state.image], state.latent);
    at("next-note").textContent = found ? `One of ${found.of} whose references of ${found.set} are mostly of this class.`
      : "No latent's references are mostly of this class.";
    if (found) change({ latent: found.latent });
  }

  async function drawReferences(mine) {
    const s = state.latent;
    let key = `${s} ${state.mask}`;
    if (s === null) {
      delete at("references").dataset.key;
      return at("references").replaceChildren();
    }
    at("loading").textContent = "";
    if (at("references").dataset.key === key) return;
    at("loading").textContent = "loading …";
    let lines;
    try {
      lines = await referenceLines(s, shown.names, state.mask);
    } catch (error) { // the former latent's would stand under this one's heading
      lines = [element("p", { class: "wrong", role: "alert" }, error.message)];
      key = "";
    }
    if (mine !== turn) return;
    at("loading").textContent = "";
    at("references").replaceChildren(...lines);
    at("references").dataset.key = key;
  }

  /** Add an image to its set's group; `sheet` is as many pictures wide and high, and it shows the one at `place`. */
  function thumbnail(number, source, [across, down] = [1, 1], [column, row] = [0, 0]) {
    const { title, set } = gallery[number], name = `${title}, ${set}`, groups = [...at("gallery").children];
    let group = groups.find((g) => g.dataset.set === set);
    if (!group) {
      group = element("div", { "data-set": set }, element("p", { class: "set" }, set[0].toUpperCase() + set.slice(1)), element("div", {}));
      at("gallery").append(group);
    }
    const share = (n, of) => (of > 1 ? (100 * n) / (of - 1) : 0);
    group.lastChild.append(element("button", {
      type: "button", class: "thumbnail", "data-number": number, "aria-pressed": false, "aria-label": name, title: name,
      style: `background-image:${source};background-size:${100 * across}% ${100 * down}%;` +
        `background-position:${share(column, across)}% ${share(row, down)}%`,
      onclick: () => (say(""), change({ image: number, patch: null, here: false }, true)),
    }));
  }

  async function openGallery() {
    const sheet = (await fetched("gallery", (b) => b)).sheet;
    root.style.setProperty("--sheet", `url("${sheet}")`);
    const across = Math.min(index.columns, pictures), down = Math.ceil(pictures / index.columns);
    index.gallery.forEach((_, i) =>
      thumbnail(i, "var(--sheet)", [across, down], [i % index.columns, Math.floor(i / index.columns)]));
    await Promise.all(index.own.map((caption, i) => showOwn(pictures + i, caption)));
  }

  async function showOwn(number, caption) {
    if (gallery[number]) return; // a view opened meanwhile has it already
    gallery[number] = caption;
    const block = await fetched(`image-${number}`, (b) => picture(b.picture));
    thumbnail(number, `url("${block.src}")`);
  }

  async function added({ number, caption, note }) {
    await showOwn(number, caption);
    say(note);
    await change({ image: number, patch: null, here: false }, true);
  }

  /** Take a picture of the reader's: the kernel does, or the page's own model. */
  async function take(file) {
    if (!file) return;
    say(`Reading ${file.name} …`);
    if (index.live) {
      const { content, note } = await fitting(file);
      return model.send({ upload: file.name, note }, undefined, [await content.arrayBuffer()]);
    }
    const number = gallery.length, found = await running(0).picture(number, file);
    const canvas = element("canvas", { width: found.size, height: found.size });
    canvas.getContext("2d").putImageData(new ImageData(found.pixels, found.size, found.size), 0, 0);
    own.set(number, canvas);
    gallery[number] = { title: file.name, set: "your pictures", group: gallery[wish.image]?.group ?? 0, label: -1 };
    thumbnail(number, `url("${canvas.toDataURL()}")`);
    say(`${file.name}: ${found.width} × ${found.height} pixels. ${found.note} It stays on this machine.`);
    await change({ image: number, patch: null, here: false }, true);
  }

  const numbers = () => ({
    picture: { number: state.image, ...gallery[state.image] }, state, sae: index.sae,
    latent: state.latent === null ? null : {
      number: state.latent, name: nameOf(shown.labels, state.latent),
      activations: shown.values.map((v, i) => ({ model: index.models[i ? state.adapted : 0], image: v[0][state.latent], patch: v[1]?.[state.latent] ?? null })),
    },
    lists: shown.groups,
    answers: (shown.answers ?? []).map(([m, before, after]) => ({ model: index.models[m], as_it_is: before, changed: after ?? null })),
  });

  async function saveCard() {
    const lines = (shown.answers ?? []).map(([m, before, after]) => {
      const text = (a) => a.classes.map((c, i) => `${c} ${percent(a.share[i])}`).join(", ");
      return `${index.models[m]}: ${text(before)}${after ? `  →  ${text(after)}` : ""}`;
    });
    const off = Object.entries(state.gains).map(([s, g]) => (g === 0 ? `${s} off` : `${s} × ${g}`));
    if (off.length) lines.push(`Latents: ${off.join(", ")}`);
    if (state.latent !== null) lines.push(`Latent ${state.latent}. ${index.named ? proofOf(nameOf(shown.labels, state.latent)) : ""}`);
    const pictures = [[at("image"), gallery[state.image].title], ...sides.map((side) => [at(`map-${side}`), at(`caption-${side}`).textContent])];
    save(await cardOf({ title: `${gallery[state.image].title} (${gallery[state.image].set})`, pictures, lines, colours: colours() }), "explorer-card.png");
  }

  const on = (name, kind, act) => at(name)?.addEventListener(kind, act);
  const number = (e) => Number(e.target.value);
  on("model", "change", (e) => change({ adapted: number(e) }, true));
  on("number", "change", (e) => pickNumber(e.target));
  on("opacity", "input", (e) => change({ opacity: number(e) }, false, true));
  on("mask", "change", (e) => change({ mask: e.target.checked }));
  on("image", "click", (e) => pickPatch(e.offsetX / at("image").clientWidth, e.offsetY / at("image").clientHeight));
  on("image", "keydown", movePatch);
  // a disabled button would lose the focus to the page
  on("whole", "click", () => (at("image").focus({ preventScroll: true }), change({ patch: null, here: false }, true)));
  on("off", "click", () => turnLatent(state.latent, state.gains[state.latent] === 0 ? 1 : 0));
  on("gain", "input", (e) => turnLatent(state.latent, number(e), `gain ${state.latent}`));
  on("here", "change", (e) => edit({ here: e.target.checked }));
  on("keep", "change", (e) => edit({ keep: e.target.value }));
  on("k", "change", (e) => edit({ k: Math.max(1, Math.min(100, Math.round(number(e)) || UNCHANGED.k)) }));
  on("undo", "click", undo);
  on("reset", "click", () => edit({ ...UNCHANGED }));
  on("search", "input", (e) => shown && search(e.target.value));
  on("next", "click", () => shown && nextLatent());
  on("card", "click", () => shown && saveCard().catch(failed));
  on("numbers", "click", () => shown && save(new Blob([JSON.stringify(numbers(), null, 1)], { type: "application/json" }), "explorer-numbers.json"));
  on("classes", "change", (e) => change({ classes: [...new Set(e.target.value.split(",").map((w) => w.trim()).filter(Boolean))] }));
  on("file", "change", (e) => take(e.target.files[0]).then(() => (e.target.value = "")).catch(failed));
  on("open", "submit", (e) => (e.preventDefault(), say(`Reading ${at("path").value} …`), model.send({ path: at("path").value })));
  if (canRun()) {
    at("boards").append(drawingBoard((file) => take(file).catch(failed)));
    root.addEventListener("dragover", (e) => e.preventDefault());
    root.addEventListener("drop", (e) => (e.preventDefault(), take(e.dataTransfer.files[0]).catch(failed)));
    root.addEventListener("paste", (e) => e.clipboardData.files.length && (e.preventDefault(), take(e.clipboardData.files[0]).catch(failed)));
  }
  // JupyterLab would move and change its cells by the plain keys pressed here
  root.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation());
  named.forEach((g) => roving(at(g)));
  ["gallery", "near-decoder", "near-together", "found"].forEach((name) => roving(at(name)));

  const heard = (message) => {
    if (message.added) added(message.added).catch(failed);
    if (message.problem) say(message.problem, true);
  };
  model.on("msg:custom", heard);
  if (inPage) addEventListener("popstate", fromAddress);
  // the theme's colours are drawn into the canvases, and so is the width
  const again = () => shown && draw();
  const resized = () => root.clientWidth !== drawnAt && again(); // not at what a drawing itself adds below
  const themes = new MutationObserver(again), sizes = new ResizeObserver(resized);
  for (const node of [document.documentElement, document.body])
    themes.observe(node, { attributes: true, attributeFilter: ["data-theme", "data-jp-theme-light"] });
  sizes.observe(el);
  openGallery().then(() => change({}, relist, true)).catch(failed);
  return () => {
    themes.disconnect();
    sizes.disconnect();
    model.off("msg:custom", heard);
    removeEventListener("popstate", fromAddress);
    answers.stop();
    engine?.close();
  };
}

export default { render };
