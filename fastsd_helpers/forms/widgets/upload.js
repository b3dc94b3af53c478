/* The file button: sends each file in pieces, and waits for the answer to each. Captions come after the photos. */
(async(input)=>{
const id=input.dataset.bridge,size=+input.dataset.piece,say=input.closest('div').querySelector('.fastsd-said');
const field=document.querySelector('.'+id+' input');
const wait=(n)=>new Promise((ok,bad)=>{const end=Date.now()+120000,t=setInterval(()=>{
const a=document.querySelector('.'+id+'-ack');
if(a&&a.dataset.n==n){clearInterval(t);ok();}
else if(Date.now()>end){clearInterval(t);bad(new Error('no answer'));}},50);});
const text=(f)=>/\.(txt|caption)$/i.test(f.name);
const large=[...input.files].filter(f=>f.size>+input.dataset.most).map(f=>f.name);
const files=[...input.files].filter(f=>!large.includes(f.name)).sort((a,b)=>text(a)-text(b));input.disabled=true;
try{for(const [i,f] of files.entries()){let o=0;do{
const part=await new Promise((ok,bad)=>{const r=new FileReader();r.onerror=()=>bad(r.error);
r.onload=()=>ok(r.result.split(',')[1]||'');r.readAsDataURL(f.slice(o,o+size));});
say.textContent=`sending ${i+1} of ${files.length}: ${f.name}, ${Math.round(100*o/Math.max(f.size,1))} %`;
const n=crypto.getRandomValues(new Uint32Array(1))[0];
field.value=JSON.stringify({n,name:f.name,offset:o,size:f.size,data:part});
field.dispatchEvent(new Event('input',{bubbles:true}));field.dispatchEvent(new Event('change',{bubbles:true}));
await wait(n);o+=size;}while(o<f.size);}
say.textContent=large.length?'Not sent, because larger than '+input.dataset.limit+': '+large.join(', ')+
'. Put it on your Drive or this machine (unpack a zip), and name its folder below.':'';}
catch(e){say.textContent='The upload stopped ('+e.message+'). Is a cell running? Wait for it, and choose the rest.';}
input.disabled=false;input.value='';})(this)
