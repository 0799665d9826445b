// What web/ takes from ComfyUI, for the checker of types: its front end ships no types with the server.
export declare const app: any;
export declare const api: any;
declare global {
  var LiteGraph: any;
}
