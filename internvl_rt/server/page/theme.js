// Sets the reader's theme before the first paint, and again when the button is pressed. Without a choice, the system's.
"use strict";
{
  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = localStorage.getItem("internvl_rt.theme");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const current = () => root.dataset.theme ?? (systemIsDark.matches ? "dark" : "light");
    const other = () => (current() === "dark" ? "light" : "dark");
    const name = () => button.setAttribute("aria-label", `Switch to the ${other()} theme`);
    button.addEventListener("click", () => {
      root.dataset.theme = other();
      localStorage.setItem("internvl_rt.theme", root.dataset.theme);
      name();
    });
    systemIsDark.addEventListener("change", name);
    name();
  });
}
