// Browsers start no web worker from a file on disk. There, the worker of the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.document.open();
      this.inside.document.write(`<body><script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done) => {
          document.body.append(Object.assign(document.createElement("script"), { src: url, onload: done }));
        })), Promise.resolve());
      <\/script><script src="${url}"><\/script>`);
      this.inside.document.close();
      this.ready = new Promise((done) => (this.inside.onload = done));
      addEventListener("message", ({ data, source }) => {
        if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
