// Runs in a page of the host's frontend (scripts/kit/browser.py puts it there): building graphs, looking at them.
window.nested = {
  // A new node on the canvas.
  make({ type, title, widgets, properties, color, bgcolor }) {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`There is no node ${type}`)
    app.graph.add(node)
    if (title) node.title = title
    if (color) { node.color = color; node.bgcolor = bgcolor }
    Object.assign(node.properties, properties || {})
    for (const [name, value] of Object.entries(widgets || {})) {
      const widget = node.widgets.find((w) => w.name === name)
      if (!widget) throw new Error(`${type} has no widget ${name}`)
      widget.value = value
      widget.callback?.(value)
    }
    return node
  },

  // Connects nodes by the names of an output and an input.
  link(source, output, target, input) {
    const out = source.outputs.findIndex((s) => s.name === output || s.label === output)
    const into = target.inputs.findIndex((s) => s.name === input)
    if (out < 0) throw new Error(`${source.type} has no output ${output}: ${source.outputs.map((s) => s.name)}`)
    if (into < 0) throw new Error(`${target.type} has no input ${input}: ${target.inputs.map((s) => s.name)}`)
    source.connect(out, target, into)
  },

  // A graph from columns of nodes: [{width, items: [{group}, {key, type, ...}, ...]}, ...]. Heights are the frontend's.
  build({ columns, notes, links }) {
    const graph = app.graph
    app.clean()
    graph.clear()
    const nodes = {}
    const GAP = 38, TITLE = 30, PAD = 16, BETWEEN = 84

    for (const { items } of columns) {
      for (const item of items) if (item.type) nodes[item.key] = this.make(item)
    }
    for (const [from, output, to, input] of links) this.link(nodes[from], output, nodes[to], input)
    // Only now: links may add inputs, and height.
    let x = 0
    for (const { width, items } of columns) {
      let y = 0, group = null
      const close = () => {
        if (!group) return
        group.pos = [x - PAD, group.top]
        group.size = [width + 2 * PAD, y - group.top - GAP + PAD]
        y += PAD + 12
      }
      for (const item of items) {
        if (item.group) {
          close()
          group = new LiteGraph.LGraphGroup(item.group)
          group.color = item.color
          group.top = y
          graph.add(group)
          y += 40
          continue
        }
        const node = nodes[item.key]
        y += TITLE
        node.pos = [x, y]
        node.setSize([width, Math.max(node.computeSize()[1], item.height || 0)])
        // The newer nodes show whose they are below the widgets.
        y += node.size[1] + GAP + (item.type.startsWith('Nested') ? 42 : 0)
      }
      close()
      x += width + BETWEEN
    }
    let at = 0
    for (const { title, text, width, height } of notes) {
      const note = this.make({ type: 'MarkdownNote', title, color: '#432', bgcolor: '#000' })
      note.widgets[0].value = text
      note.pos = [at, -height - 60]
      note.setSize([width, height])
      at += width + 40
    }
    graph.setDirtyCanvas(true, true)
  },

  // The last graph built as a blueprint: the nodes of these keys as one, with some of their widgets, alone on the canvas.
  enclose({ keys, all, title, widgets }) {
    const nodes = Object.fromEntries(all.map((key, i) => [key, app.graph._nodes[i]]))
    for (const [key, name, label] of widgets) {
      if (!label) continue
      nodes[key].inputs.find((input) => input.widget?.name === name).label = label
      nodes[key].widgets.find((widget) => widget.name === name).label = label
    }
    const { node } = app.graph.convertToSubgraph(new Set(keys.map((key) => nodes[key])))
    node.title = node.subgraph.name = title
    let number = 0
    const photos = node.inputs.filter((input) => input.type === 'IMAGE')
    for (const input of node.subgraph.inputs) {
      if (input.type === 'IMAGE' && photos.length > 1) input.label = ['first image', 'second image'][number++]
    }
    node.properties.proxyWidgets = widgets.map(([key, name]) => [String(nodes[key].id), name])
    for (const other of [...app.graph._nodes]) if (other !== node) app.graph.remove(other)
    for (const group of [...app.graph._groups]) app.graph.remove(group)
    node.pos = [0, 0]
    node.setSize([400, 100 + 24 * widgets.length])
  },

  // Everything on the canvas in view. The rectangle that it takes of the page: x, y, width, height.
  fit() {
    const boxes = app.graph._nodes.map(this.box)
    boxes.push(...app.graph._groups.map((g) => [...g.pos, g.pos[0] + g.size[0], g.pos[1] + g.size[1]]))
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return this.view(boxes, ([width, height]) => Math.min((canvas.width - 130) / width, (canvas.height - 200) / height, 1))
  },

  // Nodes of these titles or types, at full size; the rectangle that they take of the page.
  show(names) {
    const nodes = app.graph._nodes.filter((n) => names.includes(n.title) || names.includes(n.type))
    if (nodes.length < names.length) throw new Error(`Not all there: ${names}`)
    return this.view(nodes.map(this.box), () => 1)
  },

  // A node with its title: left, top, right, bottom. The newer nodes are as high as their elements.
  box(n) {
    const [x, y] = n.pos, element = document.querySelector(`[data-node-id="${n.id}"]`)
    const height = element ? element.getBoundingClientRect().height / app.canvas.ds.scale : n.size[1] + 30
    return [x, y - 30, x + n.size[0], y - 30 + height]
  },

  view(boxes, scaleOf) {
    const [left, top] = [0, 1].map((side) => Math.min(...boxes.map((b) => b[side])))
    const [right, bottom] = [2, 3].map((side) => Math.max(...boxes.map((b) => b[side])))
    const scale = scaleOf([right - left, bottom - top])
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [100 / scale - left, 160 / scale - top]
    app.canvas.setDirty(true, true)
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return [canvas.x + 100, canvas.y + 160, (right - left) * scale, (bottom - top) * scale]
  },

  // What a graph is made of, without what the frontend may change by itself: order, sizes, view.
  content(graph) {
    const nodes = graph.nodes.map(({ id, type, title, mode, inputs, outputs, widgets_values, properties, color }) => ({
      id, type, mode, color: color ?? null, title: title ?? null,
      widgets: widgets_values ?? [],
      models: properties?.models ?? null,
      inputs: (inputs ?? []).filter((i) => i.link != null).map((i) => [i.name, i.type, i.link]),
      outputs: (outputs ?? []).map((o) => [o.name, o.type, o.links ?? []])
    }))
    nodes.sort((a, b) => a.id - b.id)
    const links = graph.links.map((l) => (Array.isArray(l) ? l : [l.id, l.origin_id, l.origin_slot, l.target_id, l.target_slot, l.type]))
    links.sort((a, b) => a[0] - b[0])
    return { nodes, links, groups: (graph.groups ?? []).map((g) => g.title) }
  },

  // Types of nodes that are not there.
  missing() {
    return app.graph._nodes.filter((n) => !(n.type in LiteGraph.registered_node_types || n.subgraph)).map((n) => n.type)
  },

  // Nodes that the frontend frames in red: with files, say, that are not there.
  inError() {
    return app.graph._nodes.filter((n) => n.has_errors).map((n) => `${n.id} ${n.type}`)
  },

  // Pairs of nodes of which one lies on the other, as drawn: on the canvas, or by the newer nodes as elements.
  overlapping() {
    const elements = [...document.querySelectorAll('[data-node-id]')]
    const scale = app.canvas.ds.scale
    const boxes = elements.length
      ? elements.map((e) => {
          const box = e.getBoundingClientRect()
          return [e.dataset.nodeId, box.left / scale, box.top / scale, box.right / scale, box.bottom / scale]
        })
      : app.graph._nodes.map((n) => [n.id, ...this.box(n)])
    const pairs = []
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
      const wide = Math.min(a[3], b[3]) - Math.max(a[1], b[1]), high = Math.min(a[4], b[4]) - Math.max(a[2], b[2])
      if (wide > 2 && high > 2) {
        const [one, other] = [a, b].map((box) => app.graph.getNodeById(box[0])?.title ?? box[0])
        pairs.push(`${one} and ${other}: ${Math.round(high)}`)
      }
    }))
    return pairs
  }
}
