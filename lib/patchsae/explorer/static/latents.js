
// What is said of latents: the rule of the lists, and of one latent its statistics and reference images.

function ruleOfLists({ config, general, tau }, alone) {
  const { top, frequent } = config;
  const rule = alone
    ? `The ${top} strongest latents of the whole image and, if a patch is chosen, the ${top} of the patch. The number is ` +
      "the larger of the two activations, by which the list is sorted. "
    : `Each model names its ${top} strongest latents of the whole image and, if a patch is chosen, of ` +
      "the patch. A latent is common if both models name it; otherwise it belongs to the one that does. The number is " +
      "the largest of these activations, by which a list is sorted. ";
  return rule + (general
    ? `Latents active above ${Number(tau.toPrecision(3))} on more than ${frequent * 100} % of the ` +
      `images of ${general} are left out, here and in the bars.` : "There are no statistics, so none is left out as too frequent.");
}

function statisticsTable(latents, s, tau, title) {
  const lines = [
    ["image_frequency", "f", "activated frequency, share of images"],
    ["image_frequency_tau", `f (${tau})`, `share of images with a token above ${tau}`],
    ["mean_activation", "a", "mean activation over active images"],
    ["entropy", "e", "label entropy, nat"], ["label_std", "σ", "standard deviation of the label"],
  ];
  return element("table", {}, element("caption", {}, title),
    ...lines.map(([key, symbol, text]) => element("tr", {},
      element("th", { scope: "row" }, symbol), element("th", {}, text), element("td", {}, format(latents[key][s])))));
}

/** Return a function that makes the lines of a latent, with class names of each set, masked or not. */
function references(index, load) {
  const { references: k, thumbnail: side } = index.config;

  function reference(refs, p, cell, sheet, label, masked) {
    const drawn = element("canvas", { role: "img", "aria-label": label });
    const context = sized(drawn, side, side);
    context.drawImage(sheet, (cell % index.columns) * side, Math.floor(cell / index.columns) * side, side, side, 0, 0, side, side);
    if (masked) {
      const weights = new Float32Array(index.grid[0] * index.grid[1]);
      for (let e = refs.start[p]; e < refs.start[p + 1]; e++) weights[refs.patch[e]] = refs.weight[e] / 255;
      overlay(context, weights, index.grid, side, 0.9);
    }
    return element("figure", { "data-value": refs.value[p], "data-label": label }, drawn,
      element("figcaption", {}, `${label} `, element("b", {}, format(refs.value[p]))));
  }

  return async (s, names, masked) => {
    const block = await load(`refs-${Math.floor(s / index.chunk)}`, (b) => b.sets.map(unpackAll));
    return Promise.all(index.sets.map(async (set, d) => {
      const refs = block[d], first = (s % index.chunk) * k, places = [...Array(k).keys()].map((r) => first + r);
      const items = await Promise.all(places.filter((p) => refs.cell[p] > 0).map(async (p) => {
        const cell = refs.cell[p] - 1, page = Math.floor(cell / index.cells);
        const sheet = await load(`sheet-${d}-${page}`, (b) => picture(b.sheet));
        return reference(refs, p, cell % index.cells, sheet, names[d][refs.label[p]], masked);
      }));
      const none = items.length ? [] : [element("p", { class: "small" }, "It is active on none of them.")];
      return element("div", { class: "references" },
        element("div", {}, element("p", { class: "set" }, set.title), element("p", { class: "small" }, `${count(set.images)} images`)),
        element("div", { class: "cells", style: `--columns:${Math.min(k, 4)};--side:${side}px` }, ...items, ...none));
    }));
  };
}
