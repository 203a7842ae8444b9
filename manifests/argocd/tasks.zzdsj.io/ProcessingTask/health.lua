-- What Argo CD shows of a ProcessingTask; the same as kstatus says, and Suspended where the task is.
local hs = { status = "Progressing", message = "waiting for the operator" }
local status = obj.status
if status == nil then
  return hs
end
if status.observedGeneration ~= nil and status.observedGeneration ~= obj.metadata.generation then
  hs.message = "the operator has not seen the last change yet"
  return hs
end

local ready = {}
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "Ready" then
    ready = condition
  end
end

if status.phase == "Completed" then
  hs.status = "Healthy"
  hs.message = ready.reason or "Completed"
elseif status.phase == "Failed" or status.phase == "Canceled" then
  hs.status = "Degraded"
  local said = status.error ~= nil and status.error.message or ready.message
  hs.message = (ready.reason or status.phase) .. (said ~= nil and said ~= "" and ": " .. said or "")
elseif ready.reason == "Suspended" then
  hs.status = "Suspended"
  hs.message = "spec.suspend is set"
elseif status.queue ~= nil then
  hs.message = status.queue.reason .. (status.queue.message ~= nil and ": " .. status.queue.message or "")
elseif status.phase == "Processing" then
  hs.message = "attempt " .. string.format("%d", status.attempt or 1)
  if status.stage ~= nil then
    hs.message = hs.message .. ", " .. status.stage .. string.format(" %d %%", status.progress or 0)
  end
elseif status.phase == "Retrying" then
  hs.message = ready.message or "Retrying"
end
return hs
