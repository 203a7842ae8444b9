-- What Argo CD shows of a ProcessingSchedule; the same as kstatus says, but for Suspended, which kstatus does not know.
local hs = { status = "Progressing", message = "waiting for the operator" }
local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration == nil then
  return hs
end
if status.observedGeneration ~= obj.metadata.generation then
  hs.message = "the operator has not seen the last change yet"
  return hs
end

local found = {}
for _, condition in ipairs(status.conditions) do
  found[condition.type] = condition
end
local shown = found.Stalled or found.Ready
if shown == nil then
  return hs
end
hs.message = shown.reason .. (shown.message ~= nil and shown.message ~= "" and ": " .. shown.message or "")
if found.Stalled ~= nil and found.Stalled.status == "True" then
  hs.status = "Degraded"
elseif found.Ready ~= nil and found.Ready.status == "True" then
  hs.status = found.Ready.reason == "Suspended" and "Suspended" or "Healthy"
end
return hs
