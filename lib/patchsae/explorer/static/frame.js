
// What stands on the page before anything is loaded: two panes, the left of which keeps the picture in sight.

function frame({ index, alone, plain, sides, named, canRun, canType }) {
  const { grid: [rows, columns], live } = index, level = document.querySelector("h2") ? 3 : 2; // below the page's own
  const part = (name, tag = "div", attributes = {}, ...children) => element(tag, { "data-part": name, ...attributes }, ...children);
  const note = (name, text = "") => part(name, "p", { class: "small" }, text);
  const section = (title, ...children) => element("section", {}, element(`h${level}`, {}, title), ...children);
  const canvas = (name, label) => part(name, "canvas", { role: "img", "aria-label": label });
  const button = (name, text, attributes = {}) => part(name, "button", { type: "button", ...attributes }, text);
  const label = (text, ...children) => element("label", {}, text, ...children);
  const option = (value, text) => element("option", { value }, text);
  const minor = (name, text = "") => part(name, `h${level + 1}`, {}, text);
  const row = (...children) => element("div", { class: "px-row" }, ...children);
  const bars = (which) => element("figure", {}, part(`title-${which}`, "figcaption"),
    canvas(`bars-${which}`, `Activations of the ${which}, ${alone
      ? "the list above names" : "CLIP upwards, adapted model downwards; the lists above name"} the strongest`));
  const map = (side, i) => element("figure", {}, canvas(`map-${side}`, `Where the latent fires, ${i ? "adapted model" : plain}`),
    part(`caption-${side}`, "figcaption"));
  const near = (kind, text) => element("div", {}, minor(`title-${kind}`, text), part(`near-${kind}`, "div", { role: "group", "aria-label": text }));

  const left = element("div", { class: "left" },
    part("squares", "div", {},
      element("figure", { class: "first" }, part("image", "canvas", { tabindex: 0, role: "application",
        "aria-label": `Image of ${rows} by ${columns} patches: arrow keys move the patch, Escape takes it back` })),
      ...sides.map(map)),
    part("where", "p", { class: "small", "aria-live": "polite" }),
    note("first"),
    part("answers", "div", { role: "region", "aria-label": "What the models answer", "aria-live": "polite" }),
    row(button("whole", "Take the patch back")),
    part("progress", "p", { class: "small", role: "status" }));

  const act = section("Change what the model sees",
    row(button("off", "Switch it off", { "aria-pressed": false }),
      label("Turn the latent ", part("gain", "input", { type: "range", min: 0, max: MOST, step: 0.05, value: 1 }), part("gain-value", "output")),
      button("undo", "Undo"), button("reset", "Reset")),
    row(label("", part("here", "input", { type: "checkbox" }), " Only on the chosen patch"),
      label("The top ", part("k", "input", { type: "number", min: 1, max: 100, step: 1 }), " latents ",
        part("keep", "select", {}, option("", "as they are"), option("on", "on, all others off"), option("off", "off")))),
    note("keep-note"),
    ...(canType ? [row(label("Class names, with commas ", part("classes", "input", { type: "text", size: 26, placeholder: "cat, dog, apple" })))] : []));

  const lists = section(alone ? "Choose a latent" : "Choose the adapted model and a latent",
    ...(alone ? [] : [element("p", {}, label("Compare CLIP with ",
      part("model", "select", {}, ...index.models.slice(1).map((title, i) => option(i + 1, title)))))]),
    element("div", { class: "lists" }, ...named.map((g) => element("div", { style: `--bar:var(--px-${g})` },
      minor(`title-${g}`), part(g, "div", { role: "group" })))),
    row(label("Find a latent by word ", part("search", "input", { type: "search", size: 14, ...(index.named ? {} : { disabled: "" }) })),
      label("or number ", part("number", "input", { type: "number", min: 0, max: index.latents - 1, step: 1 })),
      button("next", "Next latent of this class")),
    part("number-message", "p", { role: "alert" }), note("next-note"), note("found-note"),
    part("found", "div", { role: "group", "aria-label": "Latents found", class: "buttons" }), note("rule", ruleOfLists(index, alone)));

  const latent = element("section", {}, part("heading", `h${level}`), note("name"),
    row(label("Strength of the map ", part("opacity", "input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.9 }), part("strength", "output"))),
    note("scale"), part("statistics"),
    element("div", { class: "lists" }, near("decoder", "Nearest by decoder"), near("together", "Nearest by firing together")));

  const charts = section("All latents", bars("image"), bars("patch"), part("legend", "p", { class: "small legend" }),
    canvas("scatter", "All latents by frequency and mean activation, the chosen one ringed"));

  const shown = section("Reference images",
    note("chosen-by", `The images of each data set that activate the latent most under ${plain}, with label and image-level activation.`),
    row(label("", part("mask", "input", { type: "checkbox", checked: "" }), " Mask: yellow where the latent fires, grey where it is silent"),
      part("loading", "span", { class: "small" })),
    part("references"));

  const own = part("own", "details", live ? { open: "" } : {}, element("summary", {}, "A picture of your own"),
    element("p", { class: "small" }, live ? "Drop or paste it here, choose a file, give its path, or draw. It goes to the kernel of this notebook and nowhere else."
      : "Drop or paste it here, choose a file, or draw. Nothing leaves this machine: the model runs in this page."),
    ...(live ? [part("open", "form", { class: "px-row" }, label("A file of yours, by path ", part("path", "input", { type: "text", placeholder: "folder/image.png", size: 24 })),
      element("button", { type: "submit" }, "Open"))] : []),
    row(label(live ? "or by upload " : "A file of yours ", part("file", "input", { type: "file", accept: "image/*" }))),
    part("boards"));

  const root = element("div", { class: alone ? "px alone" : "px" },
    part("notices", "ul", {}, ...index.notices.map((text) => element("li", {}, text))), part("message", "p", { role: "status" }),
    part("gallery", "div", { role: "group", "aria-label": "Gallery" }), ...(canRun ? [own] : []),
    element("div", { class: "panes" }, left, part("detail", "div", { class: "right", role: "region", "aria-label": "Latents", tabindex: 0 },
      lists, act, latent, shown, charts, note("precision", "Image level is the mean over CLS and all patches. Activations are shown as they were computed, to three " +
        "digits. In maps and masks the strength of the yellow is the square root of an activation's share of the largest, so " +
        "that weak patches show. Masks of reference images alone are stored rounded, to 1/255 of the strongest patch of their row. " +
        "A latent that is switched off or turned has its part of the tokens taken away or added; what the autoencoder misses stays."))),
    row(button("card", "Save this view as a picture"), button("numbers", "Save its numbers")));
  return { root, at: (name) => root.querySelector(`[data-part="${name}"]`) };
}
