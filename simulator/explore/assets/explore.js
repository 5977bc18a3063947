// The page's own script: carries the form to the address, answers to the page, and files to the server. It computes nothing.
"use strict";

(() => {
  const NARROW = window.matchMedia("screen and (max-width: 720px)");
  const LISTS = ["gpu", "family"];
  const element = (id) => document.getElementById(id);
  const form = () => element("controls");
  const marks = document.documentElement.dataset; // shown, mapped: the address that texts and figures, and the map, belong to

  function setProps(id, data) {
    // before Dash has started nothing is lost: it begins with the address as it then is
    if (window.dash_clientside.set_props) window.dash_clientside.set_props(id, { data: data });
  }

  // -- address and form ----------------------------------------------------------------------------------------------------------

  const asked = () => ({ search: window.location.search, narrow: NARROW.matches });
  const current = (question) => question.search === window.location.search && question.narrow === NARROW.matches;

  function ask() {
    element("card-crossover").setAttribute("aria-busy", "true"); // the map may take longer than the rest
    setProps("asked", asked());
  }

  function query() {
    const found = new Map();
    for (const [key, value] of new FormData(form())) {
      found.set(key, found.has(key) ? `${found.get(key)},${value}` : String(value).trim());
    }
    for (const key of LISTS) if (!found.has(key)) found.set(key, "");
    const text = (value) => encodeURIComponent(value.replace(/,\s+/g, ",")).replace(/%2C/g, ",").replace(/%3A/g, ":");
    return "?" + [...found].map(([key, value]) => `${key}=${text(value)}`).join("&");
  }

  let following = false; // after back and forward the controls follow the address

  function fill(search) {
    const given = new URLSearchParams(search);
    for (const control of form().elements) {
      if (!control.name || !given.has(control.name)) continue;
      const value = given.get(control.name);
      if (control.type === "checkbox") control.checked = value.split(",").includes(control.value);
      else if (control.type === "radio") control.checked = control.value === value;
      else control.value = control.type === "text" ? value.replaceAll(",", ", ") : value;
    }
    phase();
  }

  function phase() {
    const chosen = form().querySelector("[name=phase]:checked");
    document.body.dataset.phase = chosen ? chosen.value : "";
  }

  let edited = null; // the field that is being typed in: its changes are one step back

  function changed(event) {
    const field = event.target;
    const finished = event.type === "change"; // a list, or a number that is being replaced, is read when it is finished
    if (!finished && (field.type === "text" || (field.type === "number" && field.value === ""))) return;
    phase();
    go(query(), edited === field);
    edited = ["text", "number"].includes(field.type) ? field : null;
  }

  function go(search, same) {
    if (search === window.location.search) return;
    window.history[same ? "replaceState" : "pushState"](null, "", search);
    ask();
  }

  function option(value, text) {
    const list = element("model");
    if (![...list.options].some((o) => o.value === value)) list.add(new Option(text, value));
  }

  // -- answers --------------------------------------------------------------------------------------------------------------------

  const later = () => new Promise((done) => setTimeout(done, 0));

  async function draw(name, figure) {
    const box = element(name);
    box.style.height = `${figure.layout.height}px`; // kept free, so that nothing moves while it is drawn
    while (!window.Plotly) await new Promise((done) => document.querySelector("script[async]").addEventListener("load", done));
    return window.Plotly.react(box, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }

  let drawing = Promise.resolve();

  function show(answer) {
    if (!current(answer.asked)) return;
    for (const [id, html] of Object.entries(answer.html)) if (element(id).innerHTML !== html) element(id).innerHTML = html;
    element("grid").dataset.wide = answer.wide;
    if (answer.model) option(...answer.model);
    if (following) fill(answer.query);
    following = false;
    wantMap();
    drawing = drawing.then(() => drawAll(answer));
  }

  async function drawAll(answer) {
    for (const [name, figure] of Object.entries(answer.figures)) {
      await later(); // texts are painted before figures, and another change is heard between two of them
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

  function complain(text) {
    element("dropped-note").textContent = text;
  }

  async function read(files) {
    if (!files || !files.length) return;
    const file = files[0];
    complain("");
    if (files.length > 1) return complain(`${files.length} files: expected one config.json`);
    if (file.size > MOST_BYTES) return complain(`${file.name}: ${file.size} bytes; expected a config.json of at most ${MOST_BYTES} bytes`);
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch (error) {
      return complain(`${file.name}: is not UTF-8 text; expected a config.json`);
    }
    setProps("dropped", { name: file.name, text: text, at: Date.now() });
  }

  function choose() {
    const input = document.createElement("input");
    input.type = "file";
    input.accept = ".json,application/json";
    input.addEventListener("change", () => read(input.files));
    input.click();
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
    complain(answer.error || "");
    if (!answer.token) return;
    option(answer.token, answer.label);
    element("model").value = answer.token;
    go(query(), false);
  }

  const done = (act) => (answer) => {
    act(answer);
    return Date.now();
  };
  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    explore: { begin: asked, show: done(show), showMap: done(showMap), place: done(place) },
  });

  // this script stands below the form
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
    element("choose").addEventListener("click", choose);
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if ("copy" in button.dataset) copy(button);
      if ("save" in button.dataset) save(button);
      if ("csv" in button.dataset) setProps("csv-asked", { ...asked(), at: Date.now() });
    });
    for (const type of ["dragover", "drop", "dragleave"]) {
      document.addEventListener(type, (event) => {
        event.preventDefault();
        element("drop").classList.toggle("over", type === "dragover");
        if (type === "drop") read(event.dataTransfer.files);
      });
    }
  }
  start();
})();
