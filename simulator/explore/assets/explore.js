// The page's own script: carries the form to the address, answers to the page, and files to the server. It computes nothing.
"use strict";

(() => {
  const NARROW = window.matchMedia("(max-width: 720px)");
  const LISTS = ["gpu", "family"];
  const form = () => document.getElementById("controls");
  const setProps = (id, props) => window.dash_clientside.set_props(id, props);

  // -- address and form ----------------------------------------------------------------------------------------------------------

  function query() {
    const found = new Map();
    for (const [key, value] of new FormData(form())) {
      found.set(key, found.has(key) ? `${found.get(key)},${value}` : String(value).trim());
    }
    for (const key of LISTS) if (!found.has(key)) found.set(key, "");
    const text = (value) => encodeURIComponent(value.replace(/,\s+/g, ",")).replace(/%2C/g, ",").replace(/%3A/g, ":");
    return "?" + [...found].map(([key, value]) => `${key}=${text(value)}`).join("&");
  }

  function fill(search) {
    // back and forward: the controls follow the address; what it does not name stays as it is
    const given = new URLSearchParams(search);
    for (const element of form().elements) {
      if (!element.name || !given.has(element.name)) continue;
      const value = given.getAll(element.name).join(",");
      if (element.type === "checkbox") element.checked = value.split(",").includes(element.value);
      else if (element.type === "radio") element.checked = element.value === value;
      else element.value = value;
    }
    phase();
  }

  function phase() {
    const chosen = form().querySelector("[name=phase]:checked");
    document.body.dataset.phase = chosen ? chosen.value : "";
  }

  function changed(event) {
    // a list of sparsities is read when it is finished, everything else at once
    if (event.target.type === "text" && event.type === "input") return;
    if (event.type === "change" && event.target.type !== "text") return;
    phase();
    setProps("url", { search: query() });
  }

  // -- files ----------------------------------------------------------------------------------------------------------------------

  const MOST_BYTES = 1000000;

  function complain(text) {
    document.getElementById("dropped-note").textContent = text;
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
    setProps("dropped", { data: { name: file.name, text: text, at: Date.now() } });
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
    const chart = document.querySelector(`#${button.dataset.save} .js-plotly-plot`);
    const size = { width: chart.clientWidth, height: chart.clientHeight };
    window.Plotly.downloadImage(chart, { format: button.dataset.kind, filename: `prunesim-${button.dataset.save}`, scale: 2, ...size });
  }

  // -- called by Dash -------------------------------------------------------------------------------------------------------------

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    explore: {
      ask: (search) => ({ search: search, narrow: NARROW.matches }),
      show: (parts) => {
        for (const [id, html] of Object.entries(parts.html)) {
          const element = document.getElementById(id);
          if (element && element.innerHTML !== html) element.innerHTML = html;
        }
        document.getElementById("grid").dataset.wide = parts.gpus > 1 ? "yes" : "no";
        document.documentElement.dataset.shown = parts.search || "?";
        return Date.now();
      },
      place: (answer) => {
        complain(answer.error || "");
        if (answer.token) {
          const list = document.getElementById("model");
          for (const old of [...list.options].filter((o) => o.value === answer.token)) old.remove();
          list.add(new Option(answer.label, answer.token, true, true));
          setProps("url", { search: query() });
        }
        return Date.now();
      },
    },
  });

  document.addEventListener("DOMContentLoaded", start);
  if (document.readyState !== "loading") start();

  let started = false;
  function start() {
    if (started || !form()) return;
    started = true;
    phase();
    const settings = document.querySelector(".settings");
    if (NARROW.matches) settings.open = false;
    NARROW.addEventListener("change", () => {
      settings.open = !NARROW.matches;
      setProps("width", { data: Date.now() });
    });
    form().addEventListener("input", changed);
    form().addEventListener("change", changed);
    form().addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("popstate", () => fill(window.location.search));
    document.getElementById("choose").addEventListener("click", choose);
    document.addEventListener("click", (event) => {
      const button = event.target.closest("[data-copy], [data-save]");
      if (button) "copy" in button.dataset ? copy(button) : save(button);
    });
    for (const type of ["dragover", "drop", "dragleave"]) {
      document.addEventListener(type, (event) => {
        event.preventDefault();
        document.getElementById("drop").classList.toggle("over", type === "dragover");
        if (type === "drop") read(event.dataTransfer.files);
      });
    }
  }
})();
