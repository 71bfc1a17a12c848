
// The explorer. `model` is anywidget's in JupyterLab and a shim in the rendered page (page.js); either answers
// {want: name} with a block. Everything shown is drawn from blocks here, so both show the same numbers.

function render({ model, el }) {
  const index = model.get("index"), [rows, columns] = index.grid, patches = rows * columns;
  const load = blocks(model), gallery = [...index.gallery];
  // one model alone has one row of bars, one list and one map, and is called by its title
  const alone = index.models.length === 1, plain = alone ? index.models[0] : "CLIP";
  const sides = alone ? ["clip"] : ["clip", "adapted"], named = alone ? sides : GROUPS;
  const ground = index.general ? `On ${index.general}, under ${plain}` : "";
  // wish: what was chosen last. state: what is drawn, of which `shown` holds the data; it follows when all is loaded.
  const wish = { image: 0, patch: null, adapted: alone ? 0 : 1, latent: null, opacity: 0.9, mask: true };
  let state = { ...wish }, shown = null, turn = 0, relist = false, drawnAt = 0;
  const referenceLines = references(index, load);
  const at = (name) => root.querySelector(`[data-part="${name}"]`);
  const part = (name, tag = "div", attributes = {}) => element(tag, { "data-part": name, ...attributes });
  const note = (name, ...text) => {
    const made = part(name, "p", { class: "small" });
    made.append(...text);
    return made;
  };
  const section = (title, ...children) => element("section", {}, element("h3", {}, title), ...children);
  const canvas = (name, label) => part(name, "canvas", { role: "img", "aria-label": label });
  const say = (text, wrong = false) => {
    at("message").textContent = text;
    at("message").classList.toggle("wrong", wrong);
  };
  const adaptedName = () => index.models[state.adapted];

  const select = element("select", {
    "data-part": "model",
    onchange: (e) => change({ adapted: Number(e.target.value) }, true),
  }, ...index.models.slice(1).map((title, i) => element("option", { value: i + 1 }, title)));
  const entry = element("input", {
    "data-part": "number", type: "number", min: 0, max: index.latents - 1, step: 1,
    onchange: (e) => pickNumber(e.target),
  });
  const slider = element("input", {
    "data-part": "opacity", type: "range", min: 0, max: 1, step: 0.05, value: state.opacity,
    oninput: (e) => change({ opacity: Number(e.target.value) }),
  });
  const mask = element("input", {
    "data-part": "mask", type: "checkbox", checked: "",
    onchange: (e) => change({ mask: e.target.checked }),
  });
  const image = part("image", "canvas", {
    tabindex: 0, role: "application",
    "aria-label": `Image of ${rows} by ${columns} patches: arrow keys move the patch, Escape takes it back`,
    onclick: (e) => pickPatch(e.offsetX / image.clientWidth, e.offsetY / image.clientHeight),
    onkeydown: (e) => movePatch(e),
  });
  const whole = element("button", {
    // a disabled button would lose the focus to the page
    type: "button", "data-part": "whole", onclick: () => (image.focus({ preventScroll: true }), change({ patch: null }, true)),
  }, "Take the patch back");
  const bars = (level) => element("figure", {}, part(`title-${level}`, "figcaption"),
    canvas(`bars-${level}`, `Activations of the ${level}, ${alone
      ? "the list below names" : "CLIP upwards, adapted model downwards; the lists below name"} the strongest`));
  const map = (name, label) => element("figure", {}, canvas(`map-${name}`, `Where the latent fires, ${label}`),
    part(`caption-${name}`, "figcaption"));
  // JupyterLab would move and change its cells by the plain keys pressed here
  const keep = (event) => event.ctrlKey || event.metaKey || event.altKey || event.stopPropagation();
  const figures = sides.map((side, i) => map(side, i ? "adapted model" : plain));
  const described = [part("statistics"), canvas("scatter", "All latents by frequency and mean activation, the chosen one ringed")];
  if (alone) figures[0].append(note("scale"));
  const root = element("div", { class: alone ? "px alone" : "px", onkeydown: keep },
    part("notices", "ul"), part("message", "p", { role: "status" }),
    section("1. Pick an image", part("gallery", "div", { role: "group", "aria-label": "Gallery" }), part("own")),
    section(alone ? "2. Click a patch" : "2. Choose the adapted model and click a patch",
      ...(alone ? [] : [element("p", {}, element("label", {}, "Compare CLIP with ", select))]),
      element("div", { class: "pair" }, element("div", {}, image, part("where", "p", { class: "small", "aria-live": "polite" }), whole),
        element("div", { class: "wide" }, bars("image"), bars("patch"), part("legend", "p", { class: "small legend" })))),
    section("3. Choose a latent", note("rule"),
      element("div", { class: "lists" }, ...named.map((g) => element("div", { style: `--bar:var(--px-${g})` },
        part(`title-${g}`, "h4"), part(g, "div", { role: "group" }))))),
    element("section", {}, part("heading", "h3"),
      element("p", { class: "px-row" }, element("label", {}, "Latent number ", entry),
        element("label", {}, "Strength of the map ", slider, part("strength", "output"))),
      part("number-message", "p", { role: "alert" }),
      ...(alone ? [element("div", { class: "pair described" }, ...figures, ...described)]
        : [element("div", { class: "pair" }, ...figures), note("scale"), element("div", { class: "pair described" }, ...described)])),
    section("Reference images", note("chosen-by"), element("p", { class: "px-row" },
      element("label", {}, mask, " Mask: yellow where the latent fires, grey where it is silent"), part("loading", "span", { class: "small" })),
      part("references")),
    note("precision"));
  el.append(root);
  say("Loading the data …");

  at("notices").append(...index.notices.map((text) => element("li", {}, text)));
  at("precision").textContent =
    "Image level is the mean over CLS and all patches. Activations are shown as they were computed, to three " +
    "digits. In maps and masks the strength of the yellow is the square root of an activation's share of the largest, so " +
    "that weak patches show. Masks of reference images alone are stored rounded, to 1/255 of the strongest patch of their row.";
  at("chosen-by").textContent =
    `The images of each data set that activate the latent most under ${plain}, with label and image-level activation.`;
  at("rule").textContent = ruleOfLists(index, alone);
  named.forEach((g) => roving(at(g)));
  roving(at("gallery"));

  /** Draw what is wished for; `anew` if the lists may change, and with them the chosen latent. */
  function change(what, anew = false) {
    Object.assign(wish, what);
    relist ||= anew; // until lists are drawn, however many wishes come before
    at("number-message").textContent = "";
    return update();
  }

  /** Take back a wish whose data did not come: what is drawn and the controls agree again. */
  function takeBack() {
    Object.assign(wish, state);
    [select.value, slider.value, mask.checked, relist] = [state.adapted, state.opacity, state.mask, false];
  }

  function pickPatch(x, y) {
    const within = (share, cells) => Math.max(0, Math.min(Math.floor(share * cells), cells - 1));
    change({ patch: within(y, rows) * columns + within(x, columns) }, true);
  }

  function movePatch(event) {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Escape") return change({ patch: null }, true);
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
        load(`image-${number}`, (b) => picture(b.picture)), load("latents", unpackAll), load("names", (b) => b.sets),
        activations(0), ...(alone ? [] : [activations(adapted)]),
      ]);
    } catch (error) {
      if (mine !== turn) return;
      if (shown) takeBack();
      return say(error.message, true);
    }
    if (mine !== turn) return; // something newer is under way
    const [seen, latents, names, ...found] = loaded;
    if (!shown) say("");
    shown = { seen, found, latents, names };
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
    await drawReferences(mine);
    if (mine === turn) root.dataset.drawn = JSON.stringify(state);
  }

  function draw() {
    drawnAt = root.clientWidth;
    const wide = drawnAt - 24, roomy = wide >= 560; // 24: the padding
    drawGallery();
    drawImage(wide >= 860 ? 336 : roomy ? 280 : Math.max(160, Math.min(336, wide)));
    ["image", "patch"].forEach((level, i) => showBars(level, i));
    drawLegend();
    named.forEach(drawList);
    at("heading").textContent = state.latent === null ? "No latent is active" : `Latent ${state.latent}`;
    entry.value = state.latent ?? "";
    at("strength").textContent = `${Math.round(100 * state.opacity)} %`;
    const half = Math.max(120, Math.min(280, alone ? wide : (wide - 12) / 2));
    const maps = shown.found.map((found) => patchMap(found, state.latent, patches));
    const peak = Math.max(...maps.flatMap((map) => [...map])); // one for both, so that strengths compare
    maps.forEach((map, i) => drawMap(sides[i], map, peak, half, i));
    at("scale").textContent = peak > 0
      ? `Yellow where the latent fires, grey where it is silent; ${alone ? "" : "in both pictures "}full yellow is an ` +
        `activation of ${format(peak)}.`
      : `The latent fires on no patch of this image${alone ? "" : " under either model"}.`;
    drawStatistics();
    showScatter(Math.min(420, roomy ? wide - 252 : wide));
  }

  function drawGallery() {
    const buttons = [...at("gallery").querySelectorAll("button")];
    buttons.forEach((b) => b.setAttribute("aria-pressed", Number(b.dataset.number) === state.image));
    oneStop(buttons);
  }

  function drawImage(side) {
    const context = sized(image, side, side), { title, set } = gallery[state.image];
    context.drawImage(shown.seen, 0, 0, side, side);
    image.parentElement.style.width = `${side}px`; // however long the text below it
    whole.disabled = state.patch === null;
    const called = `${title} (${set}).`, row = Math.floor(state.patch / columns), column = state.patch % columns;
    if (state.patch === null) return (at("where").textContent = `${called} No patch is chosen: click one.`);
    framePatch(context, state.patch, index.grid, side);
    at("where").textContent = `${called} Patch: row ${row + 1}, column ${column + 1}.`;
  }

  const colours = () => {
    const style = getComputedStyle(root), read = (name) => style.getPropertyValue(`--px-${name}`).trim();
    return Object.fromEntries(["back", "text", "muted", "line", "wrong", ...GROUPS].map((name) => [name, read(name)]));
  };

  function showBars(level, i) {
    const target = at(`bars-${level}`), width = target.parentElement.parentElement.clientWidth;
    const values = shown.values.map((v) => v[i]);
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
    target.onclick = (event) => {
      const near = nearest(event.offsetX);
      if (near !== null) change({ latent: near });
    };
  }

  const groupName = (g) => alone ? "Strongest latents"
    : ({ common: "Common", clip: "Only CLIP", adapted: `Only ${adaptedName()}` })[g];

  function drawLegend() {
    const key = (g, text) => element("span", { style: `--bar:var(--px-${g})` }, text);
    at("legend").replaceChildren(...named.map((g) => key(g, groupName(g))), key("muted", alone ? "not listed" : "on no list"));
  }

  function drawList(group) {
    const entries = shown.groups[group], focus = at(group).contains(document.activeElement);
    at(`title-${group}`).textContent = `${groupName(group)} (${entries.length})`;
    at(group).setAttribute("aria-label", groupName(group));
    const peak = Math.max(1e-12, ...GROUPS.flatMap((g) => shown.groups[g].map(([, v]) => v)));
    const buttons = entries.map(([s, value]) => element("button", {
      type: "button", class: "latent", "data-latent": s, "data-value": value, "aria-pressed": s === state.latent,
      style: `--share:${(100 * value) / peak}%`, onclick: () => change({ latent: s }),
    }, element("span", {}, `latent ${s}`), element("span", {}, format(value))));
    at(group).replaceChildren(...(buttons.length ? buttons : [element("p", { class: "small" }, "none")]));
    oneStop(buttons);
    if (focus) buttons.find((b) => b.tabIndex === 0)?.focus();
  }

  function drawMap(name, map, peak, side, i) {
    const context = sized(at(`map-${name}`), side, side);
    at(`map-${name}`).parentElement.style.width = `${side}px`;
    context.drawImage(shown.seen, 0, 0, side, side);
    if (state.latent !== null) overlay(context, map.map((v) => v / (peak || 1)), index.grid, side, state.opacity);
    if (state.patch !== null) framePatch(context, state.patch, index.grid, side);
    const texts = shown.values[i].map((v, k) => `${k ? "patch" : "image"} ${format(v[state.latent])}`);
    at(`caption-${name}`).textContent = `${i ? adaptedName() : plain}: ${texts.join(", ")}`;
  }

  function drawStatistics() {
    const l = shown.latents, s = state.latent, tau = index.tau && Number(index.tau.toPrecision(3));
    if (!l.frequency || s === null) return at("statistics").replaceChildren("There are no statistics of this latent.");
    const children = [statisticsTable(l, s, tau, ground)];
    if (l.left_out[s]) children.push(element("p", { class: "small" }, `Left out of the lists: f (${tau}) is above ${index.config.frequent}.`));
    at("statistics").replaceChildren(...children);
  }

  function showScatter(width) {
    const target = at("scatter"), latents = shown.latents;
    target.hidden = !latents.frequency;
    if (target.hidden) return;
    const nearest = drawScatter(target, { latents, chosen: state.latent, colours: colours(), width });
    target.onclick = (event) => {
      const near = nearest(event.offsetX, event.offsetY);
      if (near !== null) change({ latent: near });
    };
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
      group = element("div", { "data-set": set }, element("h4", {}, set[0].toUpperCase() + set.slice(1)), element("div", {}));
      at("gallery").append(group);
    }
    const share = (n, of) => (of > 1 ? (100 * n) / (of - 1) : 0);
    group.lastChild.append(element("button", {
      type: "button", class: "thumbnail", "data-number": number, "aria-pressed": false, "aria-label": name, title: name,
      style: `background-image:${source};background-size:${100 * across}% ${100 * down}%;` +
        `background-position:${share(column, across)}% ${share(row, down)}%`,
      onclick: () => (say(""), change({ image: number, patch: null }, true)),
    }));
  }

  async function openGallery() {
    const sheet = (await load("gallery", (b) => b)).sheet, pictures = index.gallery.length;
    root.style.setProperty("--sheet", `url("${sheet}")`);
    const across = Math.min(index.columns, pictures), down = Math.ceil(pictures / index.columns);
    index.gallery.forEach((_, i) =>
      thumbnail(i, "var(--sheet)", [across, down], [i % index.columns, Math.floor(i / index.columns)]));
    await Promise.all(index.own.map((caption, i) => showOwn(pictures + i, caption)));
  }

  async function showOwn(number, caption) {
    if (gallery[number]) return; // a view opened meanwhile has it already
    gallery[number] = caption;
    const block = await load(`image-${number}`, (b) => picture(b.picture));
    thumbnail(number, `url("${block.src}")`);
  }

  async function added({ number, caption, note }) {
    await showOwn(number, caption);
    say(note);
    await change({ image: number, patch: null }, true);
  }

  async function upload(file) {
    if (!file) return;
    say(`Reading ${file.name} …`);
    const { content, note } = await fitting(file);
    model.send({ upload: file.name, note }, undefined, [await content.arrayBuffer()]);
  }

  function openOwn() {
    const path = element("input", { "data-part": "path", type: "text", placeholder: "folder/image.png", size: 24 });
    const file = element("input", {
      "data-part": "file", type: "file", accept: "image/*",
      onchange: () => upload(file.files[0]).then(() => (file.value = "")).catch((e) => say(e.message, true)),
    });
    const open = (event) => {
      event.preventDefault();
      say(`Reading ${path.value} …`);
      model.send({ path: path.value });
    };
    at("own").append(element("form", { class: "px-row", onsubmit: open },
      element("label", {}, "A file of yours, by path ", path), element("button", { type: "submit" }, "Open"),
      element("label", {}, "or by upload ", file)));
  }

  const heard = (message) => {
    if (message.added) added(message.added).catch((error) => say(error.message, true));
    if (message.problem) say(message.problem, true);
  };
  model.on("msg:custom", heard);
  if (index.live) openOwn();
  // the theme's colours are drawn into the canvases, and so is the width
  const again = () => shown && draw();
  const resized = () => root.clientWidth !== drawnAt && again(); // not at what a drawing itself adds below
  const themes = new MutationObserver(again), sizes = new ResizeObserver(resized);
  for (const node of [document.documentElement, document.body])
    themes.observe(node, { attributes: true, attributeFilter: ["data-theme", "data-jp-theme-light"] });
  sizes.observe(el);
  openGallery().then(() => change({}, true)).catch((error) => say(error.message, true));
  return () => {
    themes.disconnect();
    sizes.disconnect();
    model.off("msg:custom", heard);
  };
}

export default { render };
