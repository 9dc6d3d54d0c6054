"""ComfyUI's page as a user sees it: templates, node search, node help, Run. Written against frontend 1.47."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pack import BUILD

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Response

SCREENSHOTS = BUILD / "screenshots"
PACK = "leapfrog"
LOCALIZED_HELP = re.compile(rf"/extensions/{PACK}/docs/\w+/[\w-]+\.md$")
"""Where the page looks for help in the user's language before it takes the page that there is."""

FIND = "(type) => app.graph.nodes.find((node) => node.type === type)"


class ComfyPage:
    """One browser tab. `errors` collects uncaught exceptions and whatever failed under the pack's name."""

    def __init__(self, tab: Page, url: str):
        self.tab = tab
        self.url = url
        self.errors: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("console", self._on_console)
        tab.on("response", self._on_response)

    def open(self) -> None:
        """Load the page and wait until it has its default workflow."""
        self.tab.goto(self.url)
        self.tab.wait_for_function("window.app?.vueAppReady && window.app.graph?.nodes.length")
        self.tab.get_by_test_id("queue-button").wait_for()

    def reset(self) -> None:
        """Close what is open, empty the graph and forget old errors."""
        dialog = self.tab.get_by_role("dialog")
        if dialog.count():
            self.tab.keyboard.press("Escape")
            dialog.wait_for(state="hidden")
        if self.tab.locator(".node-help-content").count():
            self.tab.get_by_role("button", name="Toggle properties panel").click()
        self.tab.evaluate(
            """async () => {
                const workflows = app.extensionManager.workflow
                for (const one of [...workflows.openWorkflows])
                    if (one !== workflows.activeWorkflow) await workflows.closeWorkflow(one)
                app.canvas.deselectAll()
                app.graph.clear()
            }"""
        )
        self.errors.clear()

    def open_templates(self) -> None:
        """Open the template browser on the pack's category."""
        self.tab.get_by_role("button", name="Templates").first.click()
        self.tab.get_by_role("dialog").get_by_text(PACK, exact=True).first.click()

    def open_template(self, name: str) -> None:
        """Open a workflow of the pack from the template browser, and wait until the graph holds all its nodes."""
        self.open_templates()
        self.tab.get_by_test_id(f"template-workflow-{name}").click()
        self.tab.get_by_role("dialog").wait_for(state="hidden")
        self.tab.wait_for_function("app.graph.nodes.length > 6")

    def nodes(self) -> list[dict[str, Any]]:
        """Id, type, widget values by name, and bounds (with the title) of every node in the graph."""
        return self.tab.evaluate(
            """() => app.graph.nodes.map((node) => ({
                id: node.id, type: node.type, known: node.type in LiteGraph.registered_node_types,
                widgets: Object.fromEntries((node.widgets ?? []).map((one) => [one.name, one.value])),
                bounds: [...node.boundingRect],
            }))"""
        )

    def select(self, kind: str) -> None:
        self.tab.evaluate(f"(type) => {{ app.canvas.deselectAll(); app.canvas.selectItems([({FIND})(type)]) }}", kind)

    def help_of(self, kind: str) -> str:
        """Select a node, click 'Node Info' and return what the help page says."""
        self.select(kind)
        self.tab.get_by_test_id("info-button").click()
        page = self.tab.locator(".node-help-content")
        page.locator("h1").wait_for()
        return page.inner_text()

    def search(self, query: str) -> str:
        """Double-click the canvas, type, and return the search results."""
        box = self.tab.get_by_role("dialog")
        for wait in range(100):
            if box.count():
                break
            if wait % 20 == 0:  # a double click soon after the last one is lost now and then
                self.tab.mouse.dblclick(900, 600)
            self.tab.wait_for_timeout(250)
        box.wait_for()
        self.tab.keyboard.type(query)
        box.get_by_role("option").first.wait_for()
        self.tab.wait_for_timeout(500)  # results follow the typing
        return box.get_by_role("listbox").inner_text()

    def change(self, **values: Any) -> None:
        """Set widgets of these names, on whichever node they are."""
        self.tab.evaluate(
            """(values) => app.graph.nodes.flatMap((node) => node.widgets ?? [])
                .filter((one) => one.name in values).forEach((one) => { one.value = values[one.name] })""",
            values,
        )

    def listen(self) -> None:
        """From now on, keep the texts and the steps that ComfyUI announces, see `heard`."""
        self.tab.evaluate(
            """() => {
                if (!window.heard) {
                    app.api.addEventListener('progress_text', (event) => window.heard.texts.push(event.detail.text))
                    app.api.addEventListener('progress', (event) => window.heard.steps.push(event.detail.value))
                }
                window.heard = { texts: [], steps: [] }
            }"""
        )

    def heard(self) -> dict[str, list[Any]]:
        return self.tab.evaluate("window.heard")

    def text_on(self, kind: str) -> str | None:
        """The text that a node shows while it works and after."""
        return self.tab.evaluate(
            f"(type) => ({FIND})(type).widgets.find((one) => one.name === '$$node-text-preview')?.value ?? null", kind
        )

    def cancel(self) -> None:
        self.tab.get_by_role("button", name="Cancel current run").first.click()

    def run(self, timeout: float) -> str:
        """Click Run, wait until Save Image shows a picture, and return its file name."""
        self.tab.get_by_test_id("queue-button").click()
        shown = f"() => ({FIND})('SaveImage')?.imgs?.[0]?.src"
        self.tab.wait_for_function(shown, timeout=1000 * timeout)
        (name,) = re.findall(r"filename=([^&]+)", self.tab.evaluate(shown))
        return name

    def set(self, setting: str, value: Any) -> None:
        self.tab.evaluate("([id, value]) => app.extensionManager.setting.set(id, value)", [setting, value])

    def shoot(self, name: str) -> None:
        """Save a screenshot for a person to look at."""
        self.tab.wait_for_timeout(1000)  # animations, fonts
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=SCREENSHOTS / f"{name}.png")

    def _on_console(self, message: ConsoleMessage) -> None:
        where = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and PACK in where.lower() and not LOCALIZED_HELP.search(where.strip()):
            self.errors.append(where)

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and PACK in response.url and not LOCALIZED_HELP.search(response.url):
            self.errors.append(f"{response.status} {response.url}")
