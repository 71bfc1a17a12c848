// Runs explorer.js in a page without a kernel or server: blocks come as scripts beside the page.
(function (index, source) {
  const root = document.currentScript.previousElementSibling;
  const content = document.documentElement.dataset.content_root; // Sphinx says where the pages' root is
  const remedy = root.dataset.base ? "save it again, or bring the folder that was saved with it" : "build the book again";
  const base = root.dataset.base || (content === undefined ? "" : content + "_static/explorer/");
  const listeners = new Set();
  const tell = (message) => listeners.forEach((listener) => listener(message));
  const folders = ((window.patchsaeExplorer ??= {
    folders: {},
    receive(folder, name, data) {
      this.folders[folder]?.forEach((tell) => tell({ block: name, data }));
    },
  }).folders);
  (folders[index.folder] ??= []).push(tell);
  const model = {
    get: (key) => ({ index, page: true })[key], // no kernel: the address and the page's own model are the explorer's
    on: (_, listener) => listeners.add(listener),
    off: (_, listener) => listeners.delete(listener),
    send({ want }) {
      const script = document.createElement("script");
      script.src = `${base}${index.folder}/${want}.js`;
      const fail = (what) => tell({ block: want, failed: `The data of this page ${what} (${script.src}): ${remedy}.` });
      script.onload = () => (script.remove(), fail("is damaged")); // who has received the block no longer listens
      script.onerror = () => fail("is not beside it");
      document.head.append(script);
    },
  };
  // external modules do not load from file://, a Blob does
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  import(url).then((module) => {
    root.replaceChildren();
    module.default.render({ model, el: root });
  });
})
