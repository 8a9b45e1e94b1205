// The page of std-rt serve: takes frames, sends them, paints what comes back. docs/serve.md has the protocol.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const paint = canvas.getContext("2d", { alpha: false });
const view = { "/output": "output", "/watch": "watch" }[location.pathname] ?? "page";
document.body.classList.add(view);

const HEADER_BYTES = 16;
const MOST_IN_FLIGHT = 2; // frames on their way: one is painted while the next travels
const LOST_AFTER_MS = 5000; // a frame without an answer is given up
const SENT_SCALE = 1.15; // of the working size, so that rounding costs no detail
const GATHERED_AFTER_MS = 1000; // the addresses of this machine, without a server that would tell others
const FIGURES_OVER_MS = 2000;
const FEWEST_PAINTED = 3;

let info = null;
let look = { styles: {}, strength: 1, stroke_size: 1, keep_colours: false, crossfade: 1, temporal: "off" };
let styles = []; // as the server lists them
const uploaded = new Map(); // id -> File, to send again to a server that has been restarted
let source = null; // { kind, element, width, height, mirror, stop }
let sinceChange = 0; // when something changed last: a still picture is sent for a while after

// Words

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function api(path, options = {}) {
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const found = await answer.json().catch(() => ({}));
    throw new Error(found.error ?? `${path}: ${answer.status}`);
  }
  return answer;
}

const json = async (path, options) => (await api(path, options)).json();

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function stamp() {
  const two = (n) => String(n).padStart(2, "0");
  const d = new Date();
  return `std-rt-${d.getFullYear()}${two(d.getMonth() + 1)}${two(d.getDate())}-${two(d.getHours())}${two(d.getMinutes())}${two(d.getSeconds())}`;
}

// The connection: frames and settings out, results in; it comes back by itself

const link = {
  socket: null,
  path: "/v1/stream",
  wait: 500,
  wanted: false,
  invitation: null, // where the server takes an offer of WebRTC
  number: 0, // of the last frame sent
  received: 0, // of the last result
  sentAt: 0,
  newest: null, // the result that is to be painted next
  painting: false,
  before: new Map(), // number -> the frame as it was sent

  open(path) {
    this.close();
    this.path = path;
    this.wanted = true;
    this.connect();
  },

  close() {
    this.wanted = false;
    clearTimeout(this.timer);
    this.socket?.close();
    this.socket = null;
  },

  connect() {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${this.path}`);
    let refusal = "";
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.number = this.received = 0;
    this.newest = this.invitation = null;
    this.before.clear();
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data !== "string") return this.take(data);
      const message = JSON.parse(data);
      if (message.error) {
        refusal = message.error;
        say(message.error, true);
      }
      if (message.session) {
        this.invitation = message.webrtc;
        this.begin();
      }
      if (message.look) sinceChange = performance.now(); // only now it can be seen: styles take their time to encode
      if (message.figures) showServerFigures(message.figures);
    };
    socket.onclose = () => {
      if (socket !== this.socket || !this.wanted) return;
      rtc.close();
      say(`${refusal || "The server does not answer"}; trying again`, true);
      this.timer = setTimeout(() => this.connect(), this.wait);
      this.wait = Math.min(2 * this.wait, 5000);
    };
  },

  async begin() {
    this.wait = 500;
    say(view === "page" ? "Connected" : "Watching");
    if (view !== "page") return;
    await refreshStyles().catch((error) => say(error.message, true));
    this.tell(look);
    sinceChange = performance.now();
    rtc.start();
  },

  get ready() {
    return this.socket?.readyState === WebSocket.OPEN;
  },

  get hasRoom() {
    if (!this.ready || this.socket.bufferedAmount > 1 << 18) return false;
    return this.number - this.received < MOST_IN_FLIGHT || performance.now() - this.sentAt > LOST_AFTER_MS;
  },

  tell(message) {
    if (this.ready) this.socket.send(JSON.stringify(message));
  },

  async send(frame, blob, at) {
    const picture = await blob.arrayBuffer();
    if (!this.ready) return;
    const message = new ArrayBuffer(HEADER_BYTES + picture.byteLength);
    const header = new DataView(message);
    this.number += 1;
    this.sentAt = performance.now();
    header.setUint32(0, this.number, true);
    header.setUint32(4, this.received, true);
    header.setFloat64(8, at, true);
    new Uint8Array(message, HEADER_BYTES).set(new Uint8Array(picture));
    this.before.set(this.number, frame);
    this.socket.send(message);
  },

  take(message) {
    const header = new DataView(message);
    const number = header.getUint32(0, true);
    this.received = number;
    this.newest = { number, drops: header.getUint32(4, true), at: header.getFloat64(8, true), data: message.slice(HEADER_BYTES) };
    this.tell({ received: number });
    this.show();
  },

  async show() {
    if (this.painting) return; // the newest one is taken when this one is done
    this.painting = true;
    while (this.newest) {
      const result = this.newest;
      this.newest = null;
      try {
        const picture = await createImageBitmap(new Blob([result.data], { type: "image/jpeg" }));
        const before = this.before.get(result.number);
        for (const [number, frame] of this.before) {
          if (number < result.number) {
            frame.close();
            this.before.delete(number);
          }
        }
        draw(picture, before);
        count(result);
      } catch (error) {
        say(`A result could not be shown: ${error.message}`, true);
      }
    }
    this.painting = false;
  },
};

// WebRTC: the camera's frames and their results as video tracks, if the server invites to it and a way is found.
// The WebSocket carries frames until then. Afterwards, it takes a new session to go back to it.

const rtc = {
  connection: null,
  on: false, // frames go this way
  seen: false, // the server has said so
  failed: false, // not tried again until a camera is started

  async start() {
    if (this.connection || this.failed || !link.invitation || source?.kind !== "camera") return;
    if (!window.RTCPeerConnection || !HTMLVideoElement.prototype.requestVideoFrameCallback) return;
    const connection = new RTCPeerConnection();
    this.connection = connection;
    connection.ontrack = ({ track, receiver }) => {
      receiver.jitterBufferTarget = 0;
      this.show(connection, new MediaStream([track]));
    };
    connection.onconnectionstatechange = () => {
      if (connection !== this.connection) return;
      if (connection.connectionState === "connected") this.on = true;
      else if (["disconnected", "failed", "closed"].includes(connection.connectionState)) this.fail();
    };
    try {
      const [track] = grabbed.captureStream().getVideoTracks();
      track.contentHint = "detail"; // its size stays
      connection.addTrack(track);
      await connection.setLocalDescription();
      await gathered(connection);
      const headers = { "Content-Type": "application/json" };
      const body = JSON.stringify(connection.localDescription);
      const answer = await json(link.invitation, { method: "POST", headers, body });
      if (connection === this.connection) await connection.setRemoteDescription(answer);
    } catch {
      if (connection === this.connection) this.fail();
    }
  },

  show(connection, stream) {
    const element = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: stream });
    const step = async () => {
      if (connection !== this.connection) return;
      try {
        const share = Number($("divider").value);
        const [picture, before] = await Promise.all([createImageBitmap(element), share ? createImageBitmap(grabbed) : null]);
        if (connection !== this.connection) return;
        shown?.before?.close();
        draw(picture, before);
        count({ at: NaN, drops, number: 0 });
      } catch (error) {
        say(`A result could not be shown: ${error.message}`, true);
      }
      element.requestVideoFrameCallback(step);
    };
    element.requestVideoFrameCallback(step);
    element.play().catch(() => this.fail());
  },

  told({ transport, drops: dropped }) {
    if (this.on && this.seen && transport !== "webrtc") this.fail();
    this.seen = transport === "webrtc";
    if (this.on) drops = dropped;
  },

  fail() {
    this.failed = true;
    if (this.close() && link.wanted) link.open(link.path);
  },

  close() {
    // Returns whether frames went this way: then the session has ended for the WebSocket.
    const { on } = this;
    this.connection?.close();
    this.connection = null;
    this.on = this.seen = false;
    return on;
  },
};

function gathered(connection) {
  return new Promise((done) => {
    const check = () => { if (connection.iceGatheringState === "complete") done(); };
    connection.onicegatheringstatechange = check;
    setTimeout(done, GATHERED_AFTER_MS);
    check();
  });
}

// The picture, and what was before it

let shown = null; // { picture, before }

function draw(picture, before) {
  if (shown && shown.picture !== picture) shown.picture.close();
  shown = { picture, before };
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    canvas.width = picture.width;
    canvas.height = picture.height;
    placeLine();
  }
  paint.drawImage(picture, 0, 0);
  const share = $("divider").value / 100;
  if (before && share > 0) {
    const edge = Math.round(share * canvas.width);
    paint.save();
    paint.beginPath();
    paint.rect(0, 0, edge, canvas.height);
    paint.clip();
    paint.drawImage(before, 0, 0, canvas.width, canvas.height);
    paint.restore();
  }
  $("empty").hidden = true;
}

function pictureBox() {
  // Where the picture lies in the canvas's box, which may have bars beside it.
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(box.width / canvas.width, box.height / canvas.height);
  const width = canvas.width * scale;
  return { left: box.left + (box.width - width) / 2, width };
}

function placeLine() {
  const share = $("divider").value / 100;
  const { left, width } = pictureBox();
  $("line").style.display = share > 0 && share < 1 && view === "page" ? "block" : "none";
  $("line").style.left = `${left - $("screen").getBoundingClientRect().left + share * width}px`;
}

function setDivider(value) {
  $("divider").value = value;
  placeLine();
  if (shown) draw(shown.picture, shown.before);
}

// Figures

const painted = []; // { at, latency }
let drops = 0;

function count({ at, drops: dropped, number }) {
  const now = performance.now();
  painted.push({ at: now, latency: number > 0 && view === "page" && link.path === "/v1/stream" ? now - at : NaN });
  while (painted.length > FEWEST_PAINTED && painted[0].at < now - FIGURES_OVER_MS) painted.shift();
  drops = dropped;
}

function showFigures() {
  const recent = painted;
  const sorted = recent.map((each) => each.latency).filter((ms) => !Number.isNaN(ms)).sort((a, b) => a - b);
  const at = (share) => (sorted.length ? `${Math.round(sorted[Math.round(share * (sorted.length - 1))])} ms` : "–");
  if (rtc.on && serverFigures?.latency_p50_ms != null) {
    // Video frames carry no clock: what the server takes is the least that it can be.
    $("p50").textContent = `≥ ${Math.round(serverFigures.latency_p50_ms)} ms`;
    $("p95").textContent = `≥ ${Math.round(serverFigures.latency_p95_ms)} ms`;
  } else {
    $("p50").textContent = at(0.5);
    $("p95").textContent = at(0.95);
  }
  const span = recent.length > 1 ? (recent.at(-1).at - recent[0].at) / 1000 : 0;
  $("fps").textContent = span ? ((recent.length - 1) / span).toFixed(1) : "–";
  $("drops").textContent = drops;
}
setInterval(showFigures, 500);

let serverFigures = null;

function showServerFigures(figures) {
  serverFigures = figures;
  rtc.told(figures);
  $("transport").textContent = { webrtc: "WebRTC", websocket: "WebSocket" }[figures.transport];
  $("working").textContent = figures.size ? `${figures.size[0]}×${figures.size[1]}, ${figures.steps}` : "–";
  if (view === "watch") say(figures.style);
}

// Sources

const grabbed = document.createElement("canvas");
const grab = grabbed.getContext("2d", { alpha: false, willReadFrequently: true });
let encoding = false;
let lastTime = -1;

function hasNews() {
  if (source.kind === "picture") return performance.now() - sinceChange < 1000 * (look.crossfade + 2);
  const { element } = source;
  if (element.readyState < 2) return false;
  const frames = element.getVideoPlaybackQuality?.().totalVideoFrames ?? element.currentTime;
  if (frames === lastTime) return false;
  lastTime = frames;
  return true;
}

function pump() {
  requestAnimationFrame(pump);
  if (!source?.element || encoding || !(rtc.on || link.hasRoom) || !hasNews()) return;
  const at = performance.now();
  const width = source.element.videoWidth || source.element.width;
  const height = source.element.videoHeight || source.element.height;
  const scale = Math.min(1, (SENT_SCALE * side()) / Math.sqrt(width * height));
  grabbed.width = Math.max(1, Math.round(width * scale));
  grabbed.height = Math.max(1, Math.round(height * scale));
  grab.imageSmoothingQuality = "high";
  if (source.mirror && $("mirror").checked) grab.setTransform(-1, 0, 0, 1, grabbed.width, 0);
  grab.drawImage(source.element, 0, 0, grabbed.width, grabbed.height);
  if (rtc.on) return; // the canvas is the track
  encoding = true;
  Promise.all([createImageBitmap(grabbed), new Promise((done) => grabbed.toBlob(done, "image/jpeg", 0.9))])
    .then(([frame, blob]) => link.send(frame, blob, at))
    .catch((error) => say(error.message, true))
    .finally(() => { encoding = false; });
}

function side() {
  return typeof look.size === "number" ? look.size : info.size; // a pair comes from the command line
}

function use(next) {
  source?.stop?.();
  source = next;
  rtc.failed = false;
  if (rtc.close()) link.close();
  lastTime = -1;
  sinceChange = performance.now();
  const kind = next?.kind;
  $("camera").setAttribute("aria-pressed", kind === "camera");
  $("server-camera").setAttribute("aria-pressed", kind === "server");
  $("stop").hidden = !kind;
  $("mirror-row").hidden = kind !== "camera";
  $("device-row").hidden = kind !== "camera";
  $("whole").hidden = !next?.file;
  $("figures").hidden = kind === "picture"; // it is sent when something changes, which is no rate
  painted.length = 0;
  $("whole-text").textContent = "";
  if (kind !== "server" && !next?.element) link.close(); // nothing that could be sent
  else if (kind === "server") link.open("/v1/stream?source=camera");
  else if (!link.wanted || link.path !== "/v1/stream") link.open("/v1/stream");
  else rtc.start();
}

async function startCamera(device) {
  if (!navigator.mediaDevices) {
    say("Browsers give no camera to pages without https, unless they are of this machine", true);
    return;
  }
  try {
    const video = { width: { ideal: 640 }, height: { ideal: 480 }, ...(device ? { deviceId: { exact: device } } : { facingMode: "user" }) };
    const stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
    const element = document.createElement("video");
    Object.assign(element, { muted: true, playsInline: true, srcObject: stream });
    await element.play();
    use({ kind: "camera", element, mirror: true, stop: () => stream.getTracks().forEach((track) => track.stop()) });
    await listDevices(stream.getVideoTracks()[0].getSettings().deviceId);
  } catch (error) {
    say(`The camera cannot be used: ${error.message}`, true);
  }
}

async function listDevices(current) {
  const cameras = (await navigator.mediaDevices.enumerateDevices()).filter((each) => each.kind === "videoinput");
  $("device").replaceChildren(...cameras.map((each, i) => new Option(each.label || `Camera ${i + 1}`, each.deviceId, false, each.deviceId === current)));
  $("device-row").hidden = cameras.length < 2;
}

async function openFile(file) {
  if (file.type.startsWith("video/")) {
    let element = document.createElement("video");
    const url = URL.createObjectURL(file);
    Object.assign(element, { muted: true, playsInline: true, loop: true, src: url });
    const stop = () => {
      element?.pause();
      element?.removeAttribute("src");
      URL.revokeObjectURL(url);
    };
    try {
      await element.play();
    } catch {
      element = null;
      say(`${file.name} cannot be played by this browser; “Download it stylized” may read it`, true);
    }
    use({ kind: "clip", element, file, stop });
    return;
  }
  try {
    const element = await createImageBitmap(file);
    use({ kind: "picture", element, file, stop: () => element.close() });
  } catch {
    use({ kind: "picture", element: null, file });
    say(`${file.name} cannot be shown by this browser; “Download it stylized” may read it`, true);
  }
}

// Whole pictures and clips

let job = null;

function lookForm(file, name) {
  const form = new FormData();
  for (const [key, weight] of Object.entries(look.styles)) if (weight > 0) form.append("style", `${key}:${weight}`);
  for (const key of ["strength", "stroke_size", "keep_colours", "steps"]) if (look[key] != null) form.append(key, look[key]);
  if (look.size != null) form.append("size", [look.size].flat().reverse().join("x")); // a side, or [H, W]
  form.append(name, file);
  return form;
}

function upload(path, form, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = () => (request.status < 300 ? done(request.response) : failed(new Error(request.response?.error ?? `the server answered ${request.status}`)));
    request.onerror = () => failed(new Error("the server does not answer"));
    request.send(form);
  });
}

async function stylizeWhole() {
  const { file, kind } = source;
  const text = (words) => { $("whole-text").textContent = words; };
  $("whole-start").disabled = true;
  try {
    if (kind === "picture") {
      text("Painting");
      const form = lookForm(file, "picture");
      form.append("upscale", "true");
      download(await (await api("/v1/stylize", { method: "POST", body: form })).blob(), `${file.name.replace(/\.[^.]*$/, "")}_styled.png`);
      text("Done");
      return;
    }
    const bar = $("whole-progress");
    bar.hidden = false;
    job = await upload("/v1/jobs", lookForm(file, "clip"), (share) => {
      bar.value = share;
      text(`Sending, ${Math.round(100 * share)} %`);
    });
    $("whole-cancel").hidden = false;
    while (job && ["waiting", "running"].includes(job.state)) {
      bar.value = job.total ? job.frames / job.total : 0;
      text(job.state === "waiting" ? "Waiting for its turn" : `Painted ${job.frames} of ${job.total ?? "?"} frames`);
      await new Promise((done) => setTimeout(done, 500));
      if (job) job = await json(`/v1/jobs/${job.id}`);
    }
    if (!job) return text("Cancelled");
    if (job.state !== "done") throw new Error(job.error ?? job.state);
    const link = document.createElement("a");
    link.href = `/v1/jobs/${job.id}/result`;
    link.download = `${file.name.replace(/\.[^.]*$/, "")}_styled.mp4`;
    link.click();
    text(["Done", ...job.notes].join("; "));
  } catch (error) {
    text(error.message);
  } finally {
    job = null;
    $("whole-start").disabled = false;
    $("whole-cancel").hidden = $("whole-progress").hidden = true;
  }
}

// Styles

async function refreshStyles() {
  styles = (await json("/v1/styles")).styles;
  const here = new Set(styles.map((style) => style.id));
  for (const [id, file] of uploaded) if (!here.has(id)) await addStyle(file, false);
  const known = new Set(styles.map((style) => style.id));
  look.styles = Object.fromEntries(Object.entries(look.styles).filter(([id]) => known.has(id)));
  if (!Object.keys(look.styles).length && styles.length) look.styles = { [styles[0].id]: 1 };
  showStyles();
}

async function addStyle(file, choose = true) {
  const form = new FormData();
  form.append("picture", file);
  const style = await json("/v1/styles", { method: "POST", body: form });
  uploaded.set(style.id, file);
  if (!styles.some((each) => each.id === style.id)) styles.push(style);
  if (choose) {
    change({ styles: { [style.id]: 1 } });
    showStyles();
    say(`Added the style ${style.name}`);
  }
}

async function addStyles(files) {
  for (const file of files) {
    say(`Adding ${file.name}`);
    await addStyle(file).catch((error) => say(error.message, true));
  }
}

function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

function showStyles() {
  const focused = document.activeElement?.dataset?.key;
  $("styles").replaceChildren(...styles.map(styleCard));
  if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  showPad();
}

function styleCard(style) {
  const weight = look.styles[style.id] ?? 0;
  const count = Object.keys(look.styles).length;
  const pick = element("button", { type: "button", className: "pick" },
    element("img", { src: style.thumbnail, alt: "", width: 96, height: 96 }), element("span", { className: "name", textContent: style.name, title: style.name }));
  pick.setAttribute("aria-pressed", weight > 0 && count === 1);
  pick.setAttribute("aria-label", `Style ${style.name}`);
  pick.dataset.key = `pick ${style.id}`;
  pick.onclick = () => { change({ styles: { [style.id]: 1 } }); showStyles(); };
  const mix = element("input", { type: "checkbox", checked: weight > 0 });
  mix.dataset.key = `mix ${style.id}`;
  mix.setAttribute("aria-label", `Mix ${style.name} into the blend`);
  mix.onchange = () => {
    const next = { ...look.styles };
    if (mix.checked) next[style.id] = 0.5;
    else if (count > 1) delete next[style.id];
    change({ styles: next });
    showStyles();
  };
  const card = element("li", { className: weight > 0 ? "on" : "" }, pick, element("label", { className: "mix" }, mix, "mix"));
  if (weight > 0 && count > 1) {
    const slider = element("input", { type: "range", min: 0.01, max: 1, step: 0.01, value: weight });
    slider.setAttribute("aria-label", `Weight of ${style.name}`);
    slider.dataset.style = style.id;
    slider.oninput = () => { change({ styles: { ...look.styles, [style.id]: Number(slider.value) } }); placeKnob(); };
    card.append(slider);
  }
  if (style.uploaded) {
    const rename = element("button", { type: "button", textContent: "rename" });
    rename.setAttribute("aria-label", `Rename ${style.name}`);
    rename.onclick = () => renameStyle(style);
    const remove = element("button", { type: "button", textContent: "delete" });
    remove.setAttribute("aria-label", `Delete ${style.name}`);
    remove.onclick = () => removeStyle(style);
    card.append(element("div", { className: "own" }, rename, remove));
  }
  return card;
}

async function renameStyle(style) {
  const name = prompt("New name", style.name);
  if (!name) return;
  const headers = { "Content-Type": "application/json" };
  try {
    Object.assign(style, await json(`/v1/styles/${style.id}`, { method: "PATCH", headers, body: JSON.stringify({ name }) }));
    showStyles();
  } catch (error) {
    say(error.message, true);
  }
}

async function removeStyle(style) {
  uploaded.delete(style.id);
  await api(`/v1/styles/${style.id}`, { method: "DELETE" }).catch((error) => say(error.message, true));
  const { [style.id]: _, ...rest } = look.styles;
  styles = styles.filter((each) => each.id !== style.id);
  if (Object.keys(rest).length) change({ styles: rest });
  else if (styles.length) change({ styles: { [styles[0].id]: 1 } });
  showStyles();
  $("add-style").focus();
}

async function saveStyle() {
  const named = styles.filter((style) => look.styles[style.id]);
  const name = prompt("Name of the style", named.map((style) => style.name).join(" and "));
  if (!name) return;
  const query = new URLSearchParams(Object.entries(look.styles).map(([id, weight]) => ["style", `${id}:${weight}`]));
  query.append("name", name);
  query.append("stroke_size", look.stroke_size);
  try {
    download(await (await api(`/v1/style-file?${query}`)).blob(), `${name.replace(/[^\w-]+/g, "_")}.safetensors`);
  } catch (error) {
    say(error.message, true);
  }
}

// The pad: drag between the styles of a blend (with the keyboard, their sliders do the same)

function showPad() {
  const ids = Object.keys(look.styles);
  $("pad").hidden = ids.length < 2;
  $("pad").querySelectorAll("img").forEach((each) => each.remove());
  if (ids.length < 2) return;
  ids.forEach((id, i) => {
    const [x, y] = corner(i, ids.length);
    const picture = element("img", { src: `/v1/styles/${id}/thumbnail`, alt: "" });
    Object.assign(picture.style, { left: `${50 + 50 * x}%`, top: `${50 + 50 * y}%` });
    $("pad").append(picture);
  });
  placeKnob();
}

function placeKnob() {
  // The middle of the styles by weight: near enough to where the pad would give these weights.
  const weights = Object.values(look.styles);
  const total = weights.reduce((a, b) => a + b);
  let [x, y] = [0, 0];
  weights.forEach((weight, i) => {
    const [cx, cy] = corner(i, weights.length);
    x += (weight / total) * cx;
    y += (weight / total) * cy;
  });
  Object.assign($("knob").style, { left: `${50 + 50 * x}%`, top: `${50 + 50 * y}%` });
}

function corner(i, count) {
  const angle = (2 * Math.PI * i) / count - Math.PI / 2;
  return [0.8 * Math.cos(angle), 0.8 * Math.sin(angle)];
}

function dragPad(event) {
  if (!(event.buttons & 1)) return;
  const box = $("pad").getBoundingClientRect();
  const x = Math.max(-1, Math.min(1, (2 * (event.clientX - box.left)) / box.width - 1));
  const y = Math.max(-1, Math.min(1, (2 * (event.clientY - box.top)) / box.height - 1));
  const ids = Object.keys(look.styles);
  const near = ids.map((_, i) => {
    const [cx, cy] = corner(i, ids.length);
    return 1 / ((x - cx) ** 2 + (y - cy) ** 2 + 0.003);
  });
  const total = near.reduce((a, b) => a + b);
  const weights = Object.fromEntries(ids.map((id, i) => [id, Math.max(0.01, Math.round((100 * near[i]) / total) / 100)]));
  Object.assign($("knob").style, { left: `${50 + 50 * x}%`, top: `${50 + 50 * y}%` });
  document.querySelectorAll("[data-style]").forEach((slider) => { slider.value = weights[slider.dataset.style]; });
  change({ styles: weights });
}

// Settings

let waiting = null; // what is told with the next frame of the screen: a slider's newest value

function change(part) {
  Object.assign(look, part);
  sinceChange = performance.now();
  if (!waiting) requestAnimationFrame(() => { link.tell(waiting); waiting = null; });
  waiting = { ...waiting, ...part };
  showLook();
}

function showLook() {
  for (const id of ["strength", "stroke_size", "crossfade"]) {
    $(id).value = look[id];
    document.querySelector(`output[for=${id}]`).textContent = Number(look[id]).toFixed(2).replace(/0$/, "");
  }
  $("keep_colours").checked = look.keep_colours;
  $("temporal").value = look.temporal;
  $("size").value = side();
  $("steps").value = look.steps ?? info.steps;
}

// Recording

let recorder = null;

function record() {
  if (recorder) return recorder.stop();
  const kind = ["video/mp4;codecs=avc1", "video/webm;codecs=vp9", "video/webm"].find((each) => window.MediaRecorder?.isTypeSupported(each));
  if (!kind) return say("This browser cannot record", true);
  const parts = [];
  recorder = new MediaRecorder(canvas.captureStream(30), { mimeType: kind, videoBitsPerSecond: 8_000_000 });
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.onstop = () => {
    recorder = null;
    $("record").setAttribute("aria-pressed", "false");
    $("record").textContent = "Record";
    download(new Blob(parts, { type: kind }), `${stamp()}.${kind.includes("mp4") ? "mp4" : "webm"}`);
    say("Saved the recording");
  };
  recorder.start(1000);
  $("record").setAttribute("aria-pressed", "true");
  $("record").textContent = "Stop recording";
  say("Recording");
}

function snapshot() {
  if (shown) canvas.toBlob((blob) => { download(blob, `${stamp()}.png`); say("Saved a snapshot"); });
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("screen").requestFullscreen?.().catch((error) => say(error.message, true));
}

// Wiring

function dropInto(target, take) {
  target.addEventListener("dragover", (event) => { event.preventDefault(); target.classList.add("drop"); });
  target.addEventListener("dragleave", () => target.classList.remove("drop"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    target.classList.remove("drop");
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
}

function wire() {
  $("camera").onclick = () => startCamera();
  $("device").onchange = () => startCamera($("device").value);
  $("file").onclick = () => $("file-input").click();
  $("file-input").onchange = () => { if ($("file-input").files[0]) openFile($("file-input").files[0]); $("file-input").value = ""; };
  $("server-camera").onclick = () => use({ kind: "server" });
  $("stop").onclick = () => { use(null); say("Stopped"); $("camera").focus(); };
  $("whole-start").onclick = stylizeWhole;
  $("whole-cancel").onclick = () => { const { id } = job; job = null; api(`/v1/jobs/${id}`, { method: "DELETE" }).catch(() => {}); };
  $("add-style").onclick = () => $("style-input").click();
  $("style-input").onchange = async () => { await addStyles([...$("style-input").files]); $("style-input").value = ""; };
  $("save-style").onclick = saveStyle;
  $("snapshot").onclick = snapshot;
  $("record").onclick = record;
  $("fullscreen").onclick = fullScreen;
  $("divider").oninput = () => setDivider($("divider").value);
  for (const id of ["strength", "stroke_size", "crossfade"]) $(id).oninput = () => change({ [id]: Number($(id).value) });
  for (const id of ["size", "steps"]) $(id).onchange = () => change({ [id]: Number($(id).value) });
  $("temporal").onchange = () => change({ temporal: $("temporal").value });
  $("keep_colours").onchange = () => change({ keep_colours: $("keep_colours").checked });
  $("panel").onsubmit = (event) => event.preventDefault();
  $("pad").onpointerdown = (event) => { $("pad").setPointerCapture(event.pointerId); dragPad(event); };
  $("pad").onpointermove = dragPad;
  const drag = (event) => {
    if (!(event.buttons & 1) || !shown) return;
    const { left, width } = pictureBox();
    setDivider(Math.max(0, Math.min(100, (100 * (event.clientX - left)) / width)));
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); drag(event); };
  canvas.onpointermove = drag;
  addEventListener("resize", placeLine);
  document.addEventListener("fullscreenchange", placeLine);
  dropInto($("screen"), (files) => openFile(files[0]));
  dropInto($("styles-box"), addStyles);
  dropInto(document.body, addStyles);
  document.addEventListener("keydown", shortcut);
}

function shortcut(event) {
  if (event.target !== document.body || event.ctrlKey || event.metaKey || event.altKey) return;
  const style = styles[Number(event.key) - 1];
  const actions = { s: snapshot, r: record, f: fullScreen, c: () => setDivider(Number($("divider").value) ? 0 : 50), k: () => change({ keep_colours: !look.keep_colours }) };
  if (style) { change({ styles: { [style.id]: 1 } }); showStyles(); } else actions[event.key.toLowerCase()]?.();
}

function options(select, values, text = String) {
  $(select).replaceChildren(...values.map((value) => new Option(text(value), value)));
}

async function start() {
  if (view !== "page") {
    const session = new URLSearchParams(location.search).get("session");
    link.open(`/v1/watch${session ? `?session=${encodeURIComponent(session)}` : ""}`);
    return;
  }
  wire();
  info = await json("/v1/info");
  const { crossfade, ...given } = info.look;
  look = { ...look, ...given, crossfade };
  const [low, high] = info.size_range;
  const sizes = [128, 192, 256, 320, 384, 512, 640, 768, 1024].filter((px) => low <= px && px <= high);
  options("size", [...new Set([...sizes, info.size])].sort((a, b) => a - b), (px) => `${px} px`);
  options("steps", info.steps_allowed);
  [$("strength").min, $("strength").max] = info.strength_range;
  $("server-camera").hidden = !info.camera;
  $("about").textContent = `${info.bundle} on ${info.backend}. Nothing leaves the server’s machine.`;
  showLook();
  await refreshStyles();
  say("Ready");
  pump();
}

start().catch((error) => say(error.message, true));
