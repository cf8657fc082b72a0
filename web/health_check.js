// The health check of Nested Attention, for bug reports: in the menu and on the nodes of this pack.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

const MODULE = `custom_nodes.${decodeURIComponent(import.meta.url.split('/').at(-2))}`
const COMMAND = 'NestedAttention.HealthCheck'
const LABEL = 'Nested Attention: health check'
const open = () => window.open(api.apiURL('/nested_attention/health'), '_blank')

app.registerExtension({
  name: 'nestedattention.health_check',
  commands: [{ id: COMMAND, label: LABEL, icon: 'pi pi-heart', function: open }],
  menuCommands: [{ path: ['Help'], commands: [COMMAND] }],
  getNodeMenuItems: (node) =>
    node.constructor.nodeData?.python_module === MODULE ? [{ content: LABEL, callback: open }] : []
})
