"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (name, properties) => Object.assign(document.createElement(name), properties);
const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
const style = property => getComputedStyle(document.documentElement).getPropertyValue(property).trim();

// Colours as the system has them, until the button is pressed; `repaint` draws again what takes its colours from the style.
function themed(repaint) {
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = dark => {
    document.documentElement.classList.toggle("dark", dark);
    at("theme").textContent = dark ? "Light" : "Dark";
    at("theme").setAttribute("aria-label", `Use ${dark ? "light" : "dark"} colours`);
  };
  prefers.addEventListener("change", () => { theme(prefers.matches); repaint(); });
  at("theme").addEventListener("click", () => { theme(!document.documentElement.classList.contains("dark")); repaint(); });
  theme(prefers.matches);
}
at("about").textContent = data.about;
