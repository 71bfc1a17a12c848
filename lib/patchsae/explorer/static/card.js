
// A card of the current view as a picture, and its numbers as JSON.

function save(blob, name) {
  const url = URL.createObjectURL(blob), link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Draw pictures side by side above lines of text, which are cut where they would leave the card. */
function cardOf({ title, pictures, lines, colours }) {
  const width = 900, side = Math.min(288, Math.floor((width - 24 * (pictures.length + 1)) / pictures.length)), step = 22;
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = width;
  canvas.height = 92 + side + step * lines.length + 24;
  context.fillStyle = colours.back;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colours.text;
  context.font = "600 22px system-ui, sans-serif";
  context.fillText(title, 24, 36, width - 48);
  context.font = "15px system-ui, sans-serif";
  pictures.forEach(([source, caption], i) => {
    const left = 24 + i * (side + 24);
    context.drawImage(source, left, 52, side, side);
    context.fillText(caption, left, 52 + side + 20, side);
  });
  lines.forEach((line, i) => context.fillText(line, 24, 52 + side + 52 + i * step, width - 48));
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
