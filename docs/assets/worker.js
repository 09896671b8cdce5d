// Browsers start no worker for a page that is opened from a disk: the search then runs in a hidden frame, which is spoken to in the same way.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(src) {
      super()
      const frame = Object.assign(document.createElement("iframe"), { hidden: true })
      const inside = (this.inside = document.body.appendChild(frame).contentWindow)
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise(onload => inside.document.head.append(Object.assign(inside.document.createElement("script"), { src, onload })))
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
