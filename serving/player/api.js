// Talking to the server, and what this browser remembers.

export const memory = {
  read: (name, otherwise) => JSON.parse(localStorage.getItem(`lampworks.${name}`) ?? "null") ?? otherwise,
  write: (name, value) => localStorage.setItem(`lampworks.${name}`, JSON.stringify(value)),
};

export async function call(path, { token, method = "GET", body, json } = {}) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  if (json) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: json ? JSON.stringify(json) : body });
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ detail: `the server answered ${answer.status}` }));
    throw Object.assign(new Error(problem.detail), { status: answer.status, problem });
  }
  return answer;
}
export const callJson = async (...args) => (await call(...args)).json();

const REMEMBERED = 12;
export const remembered = () => memory.read("sessions", []);
export const forget = (id) => memory.write("sessions", remembered().filter((s) => s.session !== id));

/** Keeps a session's token in this browser, unless it is an API key, which is kept nowhere. */
export function remember({ session, token, model, step, borrowed }, thumb) {
  if (borrowed) return;
  const rest = remembered().filter((s) => s.session !== session), old = remembered().find((s) => s.session === session);
  memory.write("sessions", [{ session, token, model, step, thumb: thumb ?? old?.thumb }, ...rest].slice(0, REMEMBERED));
}
