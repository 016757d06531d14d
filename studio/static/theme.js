// Light or dark: as the system is, or as was chosen here.
const system = matchMedia("(prefers-color-scheme: dark)");

function apply() {
  const chosen = localStorage.getItem("theme");
  document.documentElement.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
}

/** Follow the system until `toggle` is pressed. */
export function startTheme(toggle) {
  apply();
  system.addEventListener("change", apply);
  toggle.addEventListener("click", () => {
    localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
}
