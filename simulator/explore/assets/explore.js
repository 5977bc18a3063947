// The page's script: copies the form to the address, answers to the page, and files to the server. It computes nothing.
"use strict";

(() => {
  const NARROW = window.matchMedia("screen and (max-width: 720px)");
  const LISTS = ["gpu", "family"];
  const TEXTS = ["text", "textarea"];
  const element = (id) => document.getElementById(id);
  const form = () => element("controls");
  const marks = document.documentElement.dataset; // shown, mapped: the address that texts and figures, and the map, belong to

  function setProps(id, data) {
    // before Dash has started nothing is lost: it starts with the current address
    if (window.dash_clientside.set_props) window.dash_clientside.set_props(id, { data: data });
  }

  // -- address and form ----------------------------------------------------------------------------------------------------------

  const asked = () => ({ search: window.location.search, narrow: NARROW.matches });
  const current = (question) => question.search === window.location.search && question.narrow === NARROW.matches;

  function ask() {
    element("card-crossover").setAttribute("aria-busy", "true"); // the map may take longer
    setProps("asked", asked());
  }

  const lines = (text) => text.split(/[\r\n;]+/).map((line) => line.trim()).filter(Boolean);

  function query() {
    const found = new Map();
    for (const [key, value] of new FormData(form())) {
      found.set(key, found.has(key) ? `${found.get(key)},${value}` : String(value).trim());
    }
    for (const key of LISTS) if (!found.has(key)) found.set(key, "");
    found.set("prune", lines(found.get("prune")).join(";")); // layers have commas
    if (!found.get("pin")) found.delete("pin");
    const text = (value) => encodeURIComponent(value.replace(/,\s+/g, ",")).replace(/%2C/g, ",").replace(/%3A/g, ":");
    return "?" + [...found].map(([key, value]) => `${key}=${text(value)}`).join("&");
  }

  let following = false; // after back and forward the controls follow the address

  function fill(search) {
    const given = new URLSearchParams(search);
    if (!given.has("pin")) given.set("pin", "");
    for (const control of form().elements) {
      if (!control.name || !given.has(control.name)) continue;
      const value = given.get(control.name);
      if (control.type === "checkbox") control.checked = value.split(",").includes(control.value);
      else if (control.type === "radio") control.checked = control.value === value;
      else if (control.name === "prune") control.value = lines(value).join("\n");
      else control.value = control.type === "text" ? value.replaceAll(",", ", ") : value;
    }
    phase();
  }

  function phase() {
    const chosen = form().querySelector("[name=phase]:checked");
    document.body.dataset.phase = chosen ? chosen.value : "";
    const detail = element("detail"); // the pruned model is among the choices once there is one
    detail.querySelector("[value=pruned]").disabled = !element("pruned").value;
    if (detail.selectedOptions[0].disabled) detail.value = "width";
  }

  let edited = null; // the field that is being typed in: its changes are one step back

  function changed(event) {
    const field = event.target;
    if ("add" in field.dataset) return add(field);
    // a list, or a number that is being replaced, is read when it is finished; of several lines each
    const finished = event.type === "change" || event.inputType === "insertLineBreak";
    if (!finished && (TEXTS.includes(field.type) || (field.type === "number" && field.value === ""))) return;
    phase();
    go(query(), edited === field);
    edited = ["number", ...TEXTS].includes(field.type) ? field : null;
  }

  // add the lines of a choice to a field
  function add(select) {
    const field = element(select.dataset.add);
    field.value = [...new Set([...lines(field.value), ...lines(select.value)])].join("\n");
    select.value = "";
    go(query(), false);
  }

  // keep the current setting in the address, or remove the kept one
  function pin(button) {
    const keep = button.dataset.pin !== "remove";
    element("pin").value = "";
    if (keep) element("pin").value = query().slice(1);
    go(query(), false);
  }

  function go(search, same) {
    if (search === window.location.search) return;
    window.history[same ? "replaceState" : "pushState"](null, "", search);
    ask();
  }

  // add dropped files as a choice of their control
  function option(control, value, text) {
    const known = control === "gpu" ? [...element("gpus").querySelectorAll("input")] : [...element(control).options];
    if (known.some((o) => o.value === value)) return;
    if (control !== "gpu") {
      const added = new Option(text, value);
      if (control === "detail") added.dataset.own = "";
      return element(control).add(added);
    }
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "gpu", value: value });
    label.append(box, text);
    element("gpus").append(label);
  }

  // -- answers --------------------------------------------------------------------------------------------------------------------

  const later = () => new Promise((done) => setTimeout(done, 0));

  async function draw(name, figure) {
    const box = element(name);
    box.style.height = `${figure.layout.height}px`; // reserved, so that nothing moves while it is drawn
    while (!window.Plotly) await new Promise((done) => document.querySelector("script[async]").addEventListener("load", done));
    return window.Plotly.react(box, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }

  let drawing = Promise.resolve();

  function show(answer) {
    if (!current(answer.asked)) return;
    for (const [id, html] of Object.entries(answer.html)) if (element(id).innerHTML !== html) element(id).innerHTML = html;
    element("grid").dataset.wide = answer.wide;
    for (const known of element("detail").querySelectorAll("[data-own]")) known.remove();
    for (const own of answer.own) option(...own);
    element("detail").value = answer.detail;
    if (following) fill(answer.query);
    following = false;
    wantMap();
    drawing = drawing.then(() => drawAll(answer));
  }

  async function drawAll(answer) {
    for (const [name, figure] of Object.entries(answer.figures)) {
      await later(); // texts are painted before figures, and a change can arrive between two figures
      if (!current(answer.asked)) return;
      await draw(name, figure);
    }
    marks.shown = answer.asked.search || "?";
  }

  let mapping = false; // one map at a time: while it is computed the state may change more than once

  function wantMap() {
    if (!mapping) setProps("wanted", asked());
    mapping = true;
  }

  async function showMap(answer) {
    mapping = false;
    if (!current(answer.asked)) return wantMap();
    await drawing;
    if (!current(answer.asked)) return;
    await draw("crossover", answer.figure);
    marks.mapped = answer.asked.search || "?";
    element("card-crossover").removeAttribute("aria-busy");
  }

  const send = window.fetch;
  window.fetch = async (...request) => {
    let trouble = "no answer; is prunesim explore still running?";
    try {
      const answer = await send(...request);
      trouble = answer.ok ? "" : `the server could not answer this (${answer.status})`;
      return answer;
    } finally {
      if (trouble) {
        mapping = false;
        const line = document.createElement("p");
        line.textContent = trouble;
        element("problems").replaceChildren(line);
      }
    }
  };

  // -- files ----------------------------------------------------------------------------------------------------------------------

  const MOST_BYTES = 1000000;
  const MOST_HEADER = 8000000; // of one file, and three times as much of all files: limits of the server
  const MOST_INDEX = 16000000;

  function complain(into, text) {
    for (const name of ["model", "gpu", "pruned"]) element(`note-${name}`).textContent = name === into ? text : "";
  }

  function decoded(bytes, name) {
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch (error) {
      throw `${name}: is not UTF-8 text; expected a config.json`;
    }
  }

  // Read only the header of a *.safetensors, 8 bytes and the number of bytes that they hold: no weight is read, nothing large is sent.
  async function header(file) {
    const first = await file.slice(0, 8).arrayBuffer();
    const length = first.byteLength === 8 ? Number(new DataView(first).getBigUint64(0, true)) : Infinity;
    if (length > file.size - 8) throw `${file.name}: is not a safetensors file: its header would not fit into it`;
    if (length > MOST_HEADER) throw `${file.name}: header of ${length} bytes; at most ${MOST_HEADER} are read`;
    return [decoded(await file.slice(8, 8 + length).arrayBuffer(), file.name), file.size - 8 - length];
  }

  async function contents(file, path) {
    if (file.name.endsWith(".safetensors")) {
      const [text, room] = await header(file);
      return { name: path, text: text, room: room };
    }
    const index = file.name.endsWith(".safetensors.index.json");
    const most = index ? MOST_INDEX : MOST_BYTES;
    if (file.size > most) throw `${file.name}: ${file.size} bytes; expected a config.json of at most ${most} bytes`;
    return { name: path, text: decoded(await file.arrayBuffer(), file.name), room: 0 };
  }

  // read pairs of a file and its path; of several, only files of a model
  async function read(files, into) {
    const wanted = /(^|\/)config\.json$|\.safetensors(\.index\.json)?$/;
    const some = files.length > 1 ? files.filter(([file, path]) => wanted.test(path)) : files;
    complain(into, "");
    if (!files.length) return;
    try {
      if (!some.length) throw `${files.length} files: expected one config.json, with or without the *.safetensors of its folder`;
      const sent = [];
      for (const [file, path] of some) sent.push(await contents(file, path));
      if (sent.reduce((sum, one) => sum + one.text.length, 0) > 3 * MOST_HEADER) throw `headers of more than ${3 * MOST_HEADER} bytes`;
      setProps("dropped", { files: sent, into: into, at: Date.now() });
    } catch (error) {
      complain(into, typeof error === "string" ? error : `${some[0][0].name}: cannot be read`);
    }
  }

  function choose(into) {
    const input = Object.assign(document.createElement("input"), { type: "file", multiple: into !== "gpu" });
    input.accept = into === "gpu" ? ".yaml,.yml" : ".json,.safetensors";
    input.addEventListener("change", () => read([...input.files].map((file) => [file, file.name]), into));
    input.click();
  }

  // return the dropped files; files of a folder have its name
  async function dropped(transfer) {
    const found = [];
    for (const item of [...transfer.items].map((i) => i.webkitGetAsEntry() || i.getAsFile())) {
      if (item instanceof File) found.push([item, item.name]);
      else if (item.isFile) found.push([await new Promise((done, fail) => item.file(done, fail)), item.name]);
      else found.push(...(await inside(item)));
    }
    return found;
  }

  async function inside(folder) {
    const reader = folder.createReader(), found = [];
    for (let some = [null]; some.length; ) {
      some = await new Promise((done, fail) => reader.readEntries(done, fail));
      for (const entry of some.filter((e) => e.isFile)) {
        found.push([await new Promise((done, fail) => entry.file(done, fail)), `${folder.name}/${entry.name}`]);
      }
    }
    return found;
  }

  // -- copies and downloads -------------------------------------------------------------------------------------------------------

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch (error) {
      const range = document.createRange();
      range.selectNodeContents(code);
      const selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      done = false;
    }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  function save(button) {
    const chart = element(button.dataset.save);
    const size = { width: chart.clientWidth, height: chart.clientHeight };
    window.Plotly.downloadImage(chart, { format: button.dataset.kind, filename: `prunesim-${button.dataset.save}`, scale: 2, ...size });
  }

  // -- called by Dash -------------------------------------------------------------------------------------------------------------

  function place(answer) {
    complain(answer.into, answer.error || "");
    if (!answer.token) return;
    option(answer.into, answer.token, answer.label);
    if (answer.into === "gpu") {
      // of two profiles with one name, the dropped one is used
      for (const box of element("gpus").querySelectorAll("input")) {
        if (box.value === answer.token) box.checked = true;
        else if (box.value === answer.replaces || box.parentElement.textContent.startsWith(`${answer.replaces} (`)) box.checked = false;
      }
    } else element(answer.into).value = answer.token;
    phase();
    if (answer.into === "pruned") element("detail").value = "pruned";
    go(query(), false);
  }

  const done = (act) => (answer) => {
    act(answer);
    return Date.now();
  };
  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    explore: { begin: asked, show: done(show), showMap: done(showMap), place: done(place) },
  });

  // this script is below the form
  function start() {
    phase();
    const settings = document.querySelector(".settings");
    if (NARROW.matches) settings.open = false;
    NARROW.addEventListener("change", () => {
      settings.open = !NARROW.matches;
      ask();
    });
    form().addEventListener("input", changed);
    form().addEventListener("change", changed);
    form().addEventListener("submit", (event) => event.preventDefault());
    form().addEventListener("focusout", () => (edited = null));
    window.addEventListener("popstate", () => {
      if (marks.shown === (window.location.search || "?")) return; // the skip link
      following = true;
      ask();
    });
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if ("open" in button.dataset) choose(button.dataset.open);
      if ("copy" in button.dataset) copy(button);
      if ("pin" in button.dataset) pin(button);
      if ("save" in button.dataset) save(button);
      if ("csv" in button.dataset) setProps("csv-asked", { ...asked(), at: Date.now() });
    });
    for (const type of ["dragover", "drop", "dragleave"]) {
      document.addEventListener(type, (event) => {
        event.preventDefault();
        const over = event.target.closest && event.target.closest(".drop");
        for (const zone of document.querySelectorAll(".drop")) zone.classList.toggle("over", type === "dragover" && zone === over);
        if (type !== "drop") return;
        const into = over ? over.dataset.into : "model"; // outside of all areas: a model
        dropped(event.dataTransfer).then((files) => read(files, into), () => complain(into, "the dropped files cannot be read"));
      });
    }
  }
  start();
})();
