
// Parts of the page and of its forms.

const UPLOAD = 6e6; // bytes that fit one message to the kernel with room to spare
const SIDE = 2048; // pixels that a larger upload is reduced to

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Arrow keys move among the buttons of a container, which is one stop of the Tab key. */
function roving(container) {
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const items = [...container.querySelectorAll("button")], at = items.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    const next = items[(at + step + items.length) % items.length];
    items.forEach((item) => (item.tabIndex = item === next ? 0 : -1));
    next.focus();
  });
}

function oneStop(buttons) {
  const stop = buttons.find((b) => b.getAttribute("aria-pressed") === "true") ?? buttons[0];
  buttons.forEach((b) => (b.tabIndex = b === stop ? 0 : -1));
}

/** Return a file's content, reduced where a message that holds it would end the connection to the kernel. */
async function fitting(file) {
  if (file.size <= UPLOAD) return { content: file, note: "" };
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error(`${file.name} is no image that this browser can read: choose a PNG, JPEG or WebP file.`);
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const small = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  small.getContext("2d").drawImage(bitmap, 0, 0, small.width, small.height);
  const note = ` (${bitmap.width} × ${bitmap.height} pixels, reduced to ${small.width} × ${small.height} before sending)`;
  return { content: await small.convertToBlob({ type: "image/jpeg", quality: 0.95 }), note };
}
