// Keeps what the page has loaded, so that it works offline after the first load. A new export has another VERSION and replaces it.
const CACHE = `${self.registration.scope} VERSION`;

self.addEventListener("install", event => {
  event.waitUntil(caches.open(CACHE).then(cache => cache.add("./")).then(() => self.skipWaiting()));
});

self.addEventListener("activate", event => {
  const isOld = name => name.startsWith(`${self.registration.scope} `) && name !== CACHE;
  const removal = caches.keys().then(names => Promise.all(names.filter(isOld).map(name => caches.delete(name))));
  event.waitUntil(removal.then(() => self.clients.claim()));
});

self.addEventListener("fetch", event => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith("http")) event.respondWith(fromCache(request));
});

async function fromCache(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request.mode === "navigate" ? "./" : request);
  if (kept) return kept;
  const response = await fetch(request);
  if (response.ok) await cache.put(request, response.clone()).catch(() => {}); // a full disk: the page works without
  return response;
}
