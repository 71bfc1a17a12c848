
// A picture that the reader draws.

const PEN = 14, BOARD = 224; // of the drawing, in pixels

/** A board to draw on, by pointer or by arrow keys and the space bar; `done` gets it as a PNG file. */
function drawingBoard(done) {
  const board = element("canvas", {
    "data-part": "board", tabindex: 0, width: BOARD, height: BOARD, role: "application",
    "aria-label": "Drawing board: arrow keys move the pen, the space bar puts it down and lifts it",
  });
  const context = board.getContext("2d"), said = element("span", { class: "small", role: "status" });
  const colour = element("input", { type: "color", value: "#d02020", "aria-label": "Colour of the pen" });
  let pen = null, down = false;
  const clear = () => {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, BOARD, BOARD);
  };
  const to = (x, y) => {
    const from = pen && down ? pen : [x, y];
    pen = [x, y];
    if (!down) return;
    [context.strokeStyle, context.lineWidth, context.lineCap] = [colour.value, PEN, "round"];
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...pen);
    context.stroke();
  };
  const place = (e) => [(e.offsetX * BOARD) / board.clientWidth, (e.offsetY * BOARD) / board.clientHeight];
  board.addEventListener("pointerdown", (e) => (board.setPointerCapture?.(e.pointerId), (down = false), to(...place(e)), (down = true), to(...place(e))));
  board.addEventListener("pointermove", (e) => e.buttons && to(...place(e)));
  board.addEventListener("pointerup", () => (down = false));
  board.addEventListener("keydown", (e) => {
    const move = { ArrowRight: [8, 0], ArrowLeft: [-8, 0], ArrowDown: [0, 8], ArrowUp: [0, -8] }[e.key];
    if (!move && e.key !== " ") return;
    e.preventDefault();
    pen ??= [BOARD / 2, BOARD / 2];
    if (e.key === " ") down = !down;
    const within = (v) => Math.max(0, Math.min(BOARD, v));
    to(...(move ? [within(pen[0] + move[0]), within(pen[1] + move[1])] : pen));
    said.textContent = `Pen ${down ? "down" : "up"} at ${pen.map(Math.round).join(", ")}`;
  });
  clear();
  const use = () => board.toBlob((blob) => done(new File([blob], "drawing.png", { type: "image/png" })));
  return element("div", { class: "board" }, board, element("div", { class: "px-row" }, colour,
    element("button", { type: "button", onclick: clear }, "Clear"),
    element("button", { type: "button", "data-part": "use", onclick: use }, "Show the drawing to the model")), said);
}
