// Shows on a node of this pack what it said in its last run: the text of its result. The frontend shows such text by
// itself for some nodes of its own; what it shows while a node works goes when the run ends, in newer frontends.
import { app } from '../../scripts/app.js'

const NAME = 'nested_text'
const WHILE_IT_RUNS = '$$node-text-preview' // the frontend's own, which older ones leave on the node
const HIGHEST = 200
const MODULE = `custom_nodes.${decodeURIComponent(import.meta.url.split('/').at(-2))}`
const ours = new Set()

function show(node, said) {
  const stale = node.widgets?.find((widget) => widget.name === WHILE_IT_RUNS)
  if (stale) node.removeWidget(stale)
  const text = (said ?? []).join('\n')
  let widget = node.widgets?.find((one) => one.name === NAME)
  if (!text) {
    if (widget) node.removeWidget(widget)
    return
  }
  if (!widget) {
    const element = document.createElement('div')
    element.style.cssText =
      'overflow: auto; padding: 4px 8px; font: 12px/1.35 sans-serif; white-space: pre-wrap; overflow-wrap: anywhere; ' +
      'color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px; user-select: text'
    element.style.maxHeight = `${HIGHEST}px` // the newer nodes go by the element
    const height = () => Math.min(HIGHEST, 16 + 17 * lines(element.textContent, node.size[0]))
    // Old and new names of the same: how high the widget wants to be.
    const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getHeight: height }
    widget = node.addDOMWidget(NAME, NAME, element, options)
    widget.serialize = false // no part of the file
  }
  widget.element.textContent = text // never HTML: a placeholder stands in angle brackets
  widget.element.style.minHeight = `${widget.options.getMinHeight()}px`
  const [width, wanted] = [node.size[0], node.computeSize()[1]]
  if (node.size[1] < wanted) node.setSize([width, wanted])
  node.setDirtyCanvas?.(true, true)
}

function lines(text, width) {
  const letters = Math.max(20, (width - 46) / 6.2)
  return text.split('\n').reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0)
}

// By the frontend's name of a node: its number, after that of the subgraph that it is in.
function nodeAt(name) {
  const [number, subgraph] = String(name).split(':').reverse()
  const root = app.rootGraph ?? app.graph
  return (subgraph ? root.subgraphs?.get(subgraph) : root)?.getNodeById(Number(number))
}

app.registerExtension({
  name: 'nestedattention.shown_text',

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== MODULE) return
    ours.add(nodeData.name)
    const executed = nodeType.prototype.onExecuted
    nodeType.prototype.onExecuted = function (output) {
      executed?.call(this, output)
      if (output?.text) show(this, output.text)
    }
  },

  // The results of another tab's graph are back.
  onNodeOutputsUpdated(outputs) {
    for (const [name, output] of Object.entries(outputs)) {
      const node = nodeAt(name)
      if (node && ours.has(node.type) && output?.text) show(node, output.text)
    }
  }
})
