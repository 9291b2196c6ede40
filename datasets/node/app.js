// A web application that is ready once it has answered a request to itself.
'use strict';

const http = require('http');
const express = require('express');

const app = express();
app.get('/items/:id', (request, response) => response.json({ id: Number(request.params.id) }));

const server = app.listen(3000, '127.0.0.1', () => {
  http.get('http://127.0.0.1:3000/items/7', (response) => {
    let text = '';
    response.on('data', (chunk) => { text += chunk; });
    response.on('end', () => {
      if (response.statusCode !== 200 || JSON.parse(text).id !== 7) {
        throw new Error(`unexpected answer: ${response.statusCode} ${text}`);
      }
      console.log('READY');
    });
  });
});

for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => { server.close(); server.closeAllConnections(); });
}
