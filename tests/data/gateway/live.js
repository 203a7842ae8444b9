// 前端实时监控任务状态
const ws = new WebSocket('ws://localhost:8080/ws/tasks');

ws.onmessage = function(event) {
    const taskUpdate = JSON.parse(event.data);
    console.log(`任务 ${taskUpdate.task_id} 状态: ${taskUpdate.status}`);
    console.log(`进度: ${taskUpdate.progress}%`);
    
    if (taskUpdate.status === 'completed') {
        // 刷新知识库列表
        refreshKnowledgeBase();
    }
};
