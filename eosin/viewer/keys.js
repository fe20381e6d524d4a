// Keys of the viewer's page. `holder` holds the figure first; the rest are widgets of the panel.
const PAN = 0.2, ZOOM = 1.4
const [MAP, TISSUE, GREY, NOTES] = [0, 1, 2, 3]

const ranges = () => [holder.children[0].x_range, holder.children[0].y_range]
const shift = (range, share) => {
    const by = share * (range.end - range.start)
    range.setv({start: range.start + by, end: range.end + by})
}
const pan = (x, y) => { const [across, up] = ranges(); shift(across, x); shift(up, y) }
const zoom = (factor) => ranges().forEach((range) => {
    const middle = (range.start + range.end) / 2, half = (range.end - range.start) / 2 * factor
    range.setv({start: middle - half, end: middle + half})
})
const step = (by) => {
    const keys = slide.options.map((option) => Array.isArray(option) ? option[0] : option)
    const at = keys.indexOf(slide.value) + by
    if (at >= 0 && at < keys.length) slide.value = keys[at]
}
const toggle = (part) => {
    const active = shown.active
    shown.active = active.includes(part) ? active.filter((one) => one != part) : [...active, part]
}
const press = (button) => { if (!button.disabled) Bokeh.index.find_one(button)?.button_el.click() }

const keys = {
    ArrowLeft: () => pan(-PAN, 0), ArrowRight: () => pan(PAN, 0), ArrowUp: () => pan(0, PAN), ArrowDown: () => pan(0, -PAN),
    "+": () => zoom(1 / ZOOM), "=": () => zoom(1 / ZOOM), "-": () => zoom(ZOOM), "_": () => zoom(ZOOM),
    "0": () => Bokeh.index.find_one(holder.children[0])?.reset(),
    n: () => step(1), p: () => step(-1), PageDown: () => step(1), PageUp: () => step(-1),
    m: () => toggle(MAP), t: () => toggle(TISSUE), g: () => toggle(GREY), a: () => toggle(NOTES),
    u: () => press(undo), "?": () => { help.visible = !help.visible }, Escape: () => { help.visible = false },
}
for (const [number, key] of ["v", "l", "o", "b", "r"].entries()) keys[key] = () => { tool.active = number }

const isTyping = (target) => target.matches?.("input:not([type=checkbox], [type=radio]), textarea, select, .noUi-handle")

document.addEventListener("keydown", (event) => {
    if (isTyping(event.composedPath()[0]) || event.altKey) return
    const act = event.ctrlKey || event.metaKey ? (event.key == "z" ? keys.u : undefined)
        : keys[event.key.length == 1 ? event.key.toLowerCase() : event.key]
    if (act === undefined) return
    event.preventDefault()
    act()
})
// a list that was used keeps the keys to itself otherwise
document.addEventListener("change", (event) => { if (event.composedPath()[0].matches?.("select")) event.composedPath()[0].blur() })
