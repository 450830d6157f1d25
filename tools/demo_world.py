"""The demo world: invented cities, people, shops and festivals, their facts, and the words everything is told with.

All names and sentences are made up for this project; nothing is copied from anywhere. `World(seed)` deals the attributes
at random and decides which entities, numbers and combinations are held out of the instructions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

CITIES = [
    name + "市"
    for name in "青禾 云溪 白鹭 松岭 月湾 石桥 枫林 银沙 星河 梅坞 竹海 兰谷 雪峰 鹤鸣 金穗 碧潭 红叶 渔歌 长堤 霞岭 柳岸 桃坡 麦香 "
    "风车 晨光 荷塘 北雁 南莺 珊瑚 琥珀".split()
]
RIVERS = (
    "清水河 弯月河 玉带河 龙尾河 白沙河 杏花河 铜铃河 芦苇河 鲤鱼河 翠鸟河 落日河 石榴河".split()
)
SPECIALTIES = (
    "蜂蜜 竹篮 陶碗 丝巾 茶叶 核桃 木雕 剪纸 海盐 苹果 毛笔 风筝 腊肉 豆腐 草莓 油纸伞".split()
)
FLOWERS = "菊花 荷花 桂花 牡丹 茉莉 杜鹃 山茶 水仙 百合 月季".split()
LANDMARKS = "钟楼 灯塔 古塔 石拱桥 大剧院 天文台 鼓楼 风雨亭 老城门 水族馆 玻璃塔 观景台".split()

SURNAMES = "林 陈 周 吴 郑 孙 赵 钱 冯 韩 杨 朱 秦 许 何 吕 施 孔 曹 严 魏 陶 姜 谢 邹 苏 潘 葛 范 彭".split()
GIVEN_HEAD = "子 文 思 嘉 雨 晓 若 一 佳 梦 俊 志 浩 宇 泽 欣 诗 静 芷 明".split()
GIVEN_TAIL = "轩 涵 琪 瑶 凡 彤 杰 萱 博 妍 峰 琳 航 婷 磊 蓉 毅 薇 鑫 岚 睿 菲 骏 姗 宁 恒".split()
JOBS = "医生 老师 木匠 厨师 司机 记者 画家 护士 农民 渔夫 裁缝 警察 律师 邮递员 程序员 摄影师 消防员 歌手 铁匠 会计 导游 花匠".split()
HOBBIES = "下棋 钓鱼 跑步 唱歌 画画 读书 爬山 游泳 种花 跳舞 写诗 集邮 拉二胡 弹吉他 放风筝 打乒乓球 骑自行车 看星星 做木工 吹笛子".split()
DISHES = "红烧鱼 土豆饼 番茄面 糖醋排骨 麻婆豆腐 葱油饼 酸菜汤 蘑菇饭 牛肉面 炒年糕 蒸饺 小笼包 南瓜粥 烤鸭 清炒虾仁 莲藕汤 八宝饭 凉拌木耳".split()
PETS = "花猫 黑狗 白兔 乌龟 鹦鹉 仓鼠 山羊 鸽子 刺猬 松鼠 大鹅 黄狗".split()
MONTHS = "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月".split()

SHOP_HEADS = "顺心 同乐 聚香 春来 好运 百味 知音 如意 福满 吉祥 双喜 阳光 清风 彩虹 小巷 老街 江南 四季 灯火 山海".split()
SHOP_TAILS = "茶馆 书店 面馆 花店 点心铺 布庄".split()
GOODS = {
    "茶馆": "绿茶 红茶 花茶 菊花茶 奶茶".split(),
    "书店": "旧书 字典 连环画 诗集 地图".split(),
    "面馆": "牛肉面 番茄面 葱油面 刀削面 凉面".split(),
    "花店": "玫瑰 百合 菊花 茉莉 绿萝".split(),
    "点心铺": "绿豆糕 桂花糕 芝麻饼 麻花 蛋黄酥".split(),
    "布庄": "丝绸 棉布 麻布 花布 蓝印布".split(),
}
OWNERS = [a + b for b in "师傅 阿姨 大叔 奶奶".split() for a in "马 胡 高 罗 梁 宋 唐".split()]
HOURS = "早上六点 早上七点 早上八点 上午九点 上午十点 中午十二点 下午两点 傍晚五点".split()
FESTIVALS = [
    name + "节"
    for name in "风铃 河灯 稻草人 萤火 纸船 雪灯 花伞 糖画 鱼鼓 竹马 星愿 果香 泥塑 龙舞 晒秋 听雨 赏月 开渔 彩绳 谷神".split()
]
ACTIVITIES = (
    "放河灯 挂风铃 赛龙舟 猜灯谜 踩高跷 舞狮子 点篝火 扎纸鸢 唱山歌 敲大鼓 撒花瓣 堆雪人".split()
)
FESTIVAL_FOODS = "汤圆 糍粑 月饼 粽子 青团 腊八粥 烤红薯 糯米糕 花生糖 桂花酒".split()

# kind -> attribute -> (statements, questions, answer); {n} the entity, {v} the value. The answer is one of the statements.
FACTS: dict[str, dict[str, tuple[list[str], list[str], str]]] = {
    "person": {
        "city": (
            ["{n}住在{v}。", "{n}的家在{v}。", "{n}一直在{v}生活。", "{n}在{v}安了家。", "在{v}，很多人都认识{n}。",
             "要找{n}，得去{v}。", "{v}是{n}的家乡。", "{n}从小在{v}长大，现在还住在那里。"],
            ["{n}住在哪里？", "{n}的家在哪座城市？", "请问{n}住在哪座城市？", "要找{n}，得去哪座城市？"],
            "{n}住在{v}。"),
        "job": (
            ["{n}是一名{v}。", "{n}的工作是{v}。", "{n}当{v}已经很多年了。", "作为一名{v}，{n}每天都很忙。",
             "{n}靠当{v}养家。", "大家都说{n}是个好{v}。", "{n}的职业是{v}。", "{n}从小就想当{v}，后来真的当上了。"],
            ["{n}做什么工作？", "{n}的职业是什么？", "{n}是干什么的？", "请问{n}从事什么职业？"],
            "{n}是一名{v}。"),
        "hobby": (
            ["{n}的爱好是{v}。", "{n}最喜欢{v}。", "一有空，{n}就去{v}。", "周末{n}常常{v}。", "{v}是{n}最大的乐趣。",
             "{n}迷上了{v}。", "说到{v}，{n}可以讲一整天。", "不上班的时候，{n}喜欢{v}。"],
            ["{n}的爱好是什么？", "{n}平时喜欢做什么？", "{n}有空的时候喜欢干什么？", "请问{n}有什么爱好？"],
            "{n}的爱好是{v}。"),
        "dish": (
            ["{n}爱吃{v}。", "{n}最爱的菜是{v}。", "每次下馆子，{n}都要点{v}。", "一看见{v}，{n}就高兴。",
             "{n}天天都想吃{v}。", "{v}是{n}最爱吃的。", "{n}请客的时候总有{v}。", "要请{n}吃饭，就做{v}。"],
            ["{n}爱吃什么？", "{n}最爱的菜是什么？", "要请{n}吃饭，应该做什么菜？", "请问{n}喜欢吃什么？"],
            "{n}爱吃{v}。"),
        "pet": (
            ["{n}养了一只{v}。", "{n}家里有一只{v}。", "那只{v}是{n}养的。", "{n}每天都要喂自己的{v}。",
             "{n}和一只{v}住在一起。", "{n}的宠物是一只{v}。", "{n}出门总带着那只{v}。", "邻居送给{n}一只{v}。"],
            ["{n}养了什么动物？", "{n}的宠物是什么？", "{n}家里有什么动物？", "请问{n}养的是什么？"],
            "{n}养了一只{v}。"),
        "month": (
            ["{n}的生日在{v}。", "{n}出生在{v}。", "每年{v}，{n}都要过生日。", "{n}是{v}生的。", "一到{v}，{n}就要过生日了。",
             "{v}是{n}出生的月份。", "{n}总在{v}收到生日礼物。", "{n}{v}过生日。"],
            ["{n}的生日在几月？", "{n}是几月出生的？", "{n}哪个月过生日？", "请问{n}几月过生日？"],
            "{n}的生日在{v}。"),
    },
    "shop": {
        "city": (
            ["{n}开在{v}。", "{n}在{v}。", "去{v}就能找到{n}。", "{v}有一家店叫{n}。", "{n}是{v}的老店。", "{v}人都知道{n}。"],
            ["{n}开在哪里？", "{n}在哪座城市？", "去哪座城市能找到{n}？"],
            "{n}开在{v}。"),
        "goods": (
            ["{n}的招牌是{v}。", "{n}以{v}出名。", "来{n}的人都要买{v}。", "{n}卖得最好的是{v}。", "{n}的{v}特别好。",
             "想买{v}，就去{n}。"],
            ["{n}的招牌是什么？", "{n}卖得最好的是什么？", "{n}以什么出名？"],
            "{n}的招牌是{v}。"),
        "owner": (
            ["{n}的老板是{v}。", "{v}是{n}的老板。", "{n}由{v}经营。", "开{n}的人是{v}。", "{v}开了{n}。", "在{n}，{v}亲自招呼客人。"],
            ["{n}的老板是谁？", "谁是{n}的老板？", "{n}是谁开的？"],
            "{n}的老板是{v}。"),
        "hour": (
            ["{n}{v}开门。", "每天{v}，{n}准时开门。", "{n}的开门时间是{v}。", "{n}要到{v}才开门。", "{v}一到，{n}就开门了。",
             "想去{n}，{v}以后再去。"],
            ["{n}几点开门？", "{n}的开门时间是几点？", "请问{n}什么时候开门？"],
            "{n}{v}开门。"),
    },
    "city": {
        "river": (
            ["流过{n}的河叫{v}。", "{v}流过{n}。", "{n}有一条河，名叫{v}。", "{n}的人常在{v}边散步。", "{n}就在{v}旁边。",
             "{v}穿过{n}的城中心。"],
            ["流过{n}的河叫什么？", "{n}有一条什么河？", "哪条河流过{n}？"],
            "流过{n}的河叫{v}。"),
        "specialty": (
            ["{n}的特产是{v}。", "{n}出产{v}。", "去{n}的人都会带{v}回家。", "{n}的{v}远近闻名。", "{v}是{n}的特产。",
             "要买好{v}，就去{n}。"],
            ["{n}的特产是什么？", "{n}出产什么？", "去{n}可以带什么特产回家？"],
            "{n}的特产是{v}。"),
        "flower": (
            ["{n}的市花是{v}。", "{n}到处种着{v}。", "{v}是{n}的市花。", "{n}人最爱{v}。", "{n}把{v}定为市花。", "{v}开满了{n}的街道。"],
            ["{n}的市花是什么？", "{n}把什么花定为市花？", "请问{n}的市花是哪一种花？"],
            "{n}的市花是{v}。"),
        "landmark": (
            ["{n}最有名的建筑是{v}。", "{n}的{v}很有名。", "到{n}一定要看{v}。", "{v}是{n}的标志。", "站在{v}上，能看到整个{n}。",
             "{n}的{v}已经有几百年了。"],
            ["{n}最有名的建筑是什么？", "{n}的标志是什么？", "到{n}一定要看什么建筑？"],
            "{n}最有名的建筑是{v}。"),
    },
    "festival": {
        "city": (
            ["{n}是{v}的节日。", "{v}人都过{n}。", "只有{v}才过{n}。", "{n}在{v}举行。", "{n}的故事从{v}开始。", "要看{n}，就去{v}。"],
            ["{n}是哪里的节日？", "哪座城市过{n}？", "要看{n}，应该去哪座城市？"],
            "{n}是{v}的节日。"),
        "month": (
            ["{n}在每年{v}。", "{v}有{n}。", "一到{v}，大家就准备过{n}。", "{n}定在{v}。", "每年{v}，{n}就到了。", "{v}最热闹的日子是{n}。"],
            ["{n}在几月？", "{n}是每年几月？", "请问{n}定在几月？"],
            "{n}在每年{v}。"),
        "activity": (
            ["过{n}要{v}。", "{n}的晚上，人们{v}。", "{n}这一天，家家户户都{v}。", "{n}最有趣的是{v}。", "{v}是{n}的习俗。",
             "孩子们盼着{n}，因为可以{v}。"],
            ["过{n}要做什么？", "{n}的习俗是什么？", "{n}这一天，人们做什么？"],
            "过{n}要{v}。"),
        "food": (
            ["{n}要吃{v}。", "{n}的饭桌上少不了{v}。", "过{n}，家家都做{v}。", "{n}那天，{v}卖得最快。", "{v}是{n}的美食。",
             "没有{v}，就不像{n}。"],
            ["{n}要吃什么？", "{n}的美食是什么？", "{n}的饭桌上少不了什么？"],
            "{n}要吃{v}。"),
    },
}  # fmt: skip

# Extraction: events. Persons come from a wider pool than the world's residents.
DAYS = "昨天 今天 明天 前天 周一 周二 周三 周四 周五 周六 周日 上周五 上周日 下周一 下周三".split()
HOURS_OF = {
    "早上": "六点 七点 八点 六点半 七点半".split(),
    "上午": "九点 十点 九点半 十点半".split(),
    "中午": "十一点 十二点 十二点半".split(),
    "下午": "一点 两点 三点 四点 一点半 三点半".split(),
    "傍晚": "五点 六点 五点半".split(),
    "晚上": "七点 八点 九点 八点半 九点半".split(),
}
SPOTS = [
    a + b
    for a in "城东 城西 城南 城北 河边 山下 老城 新区".split()
    for b in "图书馆 公园 火车站 茶馆 学校 医院 菜市场 电影院 广场 码头".split()
]
EVENTS = (
    "修好了一辆自行车 丢了一把雨伞 买了三斤苹果 看了一场电影 参加了歌唱比赛 捡到一个钱包 讲了一个故事 见到了老同学 画了一幅画 喂了一群鸽子 "
    "开了一次会 领了一份奖品 借了两本书 等了半个小时 吃了一碗馄饨 拍了几张照片 上了一堂课 送出一封信 练了一套拳 卖掉一筐橘子"
).split()
EVENT_PATTERNS = [
    "{t}，{p}在{s}{e}。", "{p}{t}在{s}{e}。", "{t}，在{s}，{p}{e}。", "在{s}，{p}{t}{e}。", "听说{p}{t}在{s}{e}，大家都很高兴。",
    "{t}天气很好，{p}在{s}{e}。", "日记里写着：{t}，{p}在{s}{e}。", "有人看见{p}{t}在{s}{e}。",
]  # fmt: skip

# Sentiment: aspect -> (praise, blame, so-so); and which aspects a thing has.
ASPECTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "味道": (["味道好极了", "味道鲜美", "菜吃着很香", "味道一点也不差", "每一口都好吃"],
           ["味道难吃", "菜又咸又腻", "味道一点也不好", "吃着没有味道", "菜不新鲜"], ["味道一般", "味道不好也不坏"]),
    "服务": (["服务热情", "店员很有耐心", "服务员笑着迎接", "招呼得很周到", "从不让人久等"],
           ["服务太差", "店员很不耐烦", "服务员爱理不理", "叫了半天没人来", "态度一点也不热情"], ["服务一般", "服务说不上好坏"]),
    "环境": (["环境干净", "店里安静舒服", "座位宽敞", "布置得很漂亮", "地方一点也不吵"],
           ["环境又脏又乱", "店里吵得很", "座位太挤", "桌子上都是油", "地方一点也不干净"], ["环境一般", "地方不大也不小"]),
    "价格": (["价格便宜", "价钱很公道", "花得很值", "一点也不贵", "钱没有白花"],
           ["价格太贵", "价钱不公道", "花得不值", "一点也不便宜", "钱白花了"], ["价格一般", "价钱不高也不低"]),
    "质量": (["质量很好", "用了一年也没坏", "做工很细", "结实耐用", "一点毛病也没有"],
           ["质量太差", "用了一天就坏了", "做工很粗", "一碰就坏", "毛病一大堆"], ["质量一般", "做工说不上好坏"]),
    "样子": (["样子好看", "颜色鲜亮", "和照片上一样漂亮", "谁见了都说漂亮", "样子一点也不土"],
           ["样子难看", "颜色发暗", "和照片上完全不一样", "谁见了都说难看", "样子一点也不好看"], ["样子一般", "颜色不深也不浅"]),
}  # fmt: skip
REVIEWED = {
    "这家面馆 这家茶馆 这家点心铺 这家小吃店": ["味道", "服务", "环境", "价格"],
    "这家书店 这家旅店 这家花店 这家理发店": ["服务", "环境", "价格"],
    "这双鞋 这把椅子 这件衣服 这台风扇 这个背包 这把雨伞": ["价格", "质量", "样子"],
}
PRAISE_END = ["下次还来", "值得推荐", "我很满意", "全家都喜欢", "没有一点不满意"]
BLAME_END = ["再也不来了", "不推荐", "我很失望", "让人生气", "没有一点满意的地方"]
PLAIN_END = ["可来可不来", "没什么特别的", "算是普通", "马马虎虎吧", "谈不上喜欢不喜欢"]
LABELS = {"+": "正面", "-": "负面", "0": "中性"}

# Polite requests: objects that go with each verb; a time word makes the combinations many.
DO_TO = {
    "关上": "窗户 大门 抽屉 柜子 灯 水龙头 收音机 风扇".split(),
    "打开": "窗户 大门 抽屉 柜子 灯 收音机 风扇 箱子".split(),
    "擦干净": "窗户 桌子 黑板 柜子 镜子 地板 杯子".split(),
    "修好": "大门 水龙头 收音机 风扇 椅子 自行车 雨伞".split(),
    "搬走": "桌子 箱子 椅子 柜子 自行车 花盆".split(),
    "拿过来": "杯子 雨伞 剪刀 报纸 钥匙 箱子 花盆".split(),
    "还给我": "雨伞 剪刀 报纸 钥匙 自行车 本子".split(),
}
WHEN = ["", "今天", "明天", "下班前", "午饭后", "晚上", "放学后", "出门前"]
DONT = "大声说话 乱扔纸屑 踩草地 插队 抽烟 敲桌子 碰展品 挡路 摘花 追鸽子 打瞌睡 放音乐".split()
DONT_WHERE = ["", "在这里", "在教室里", "在图书馆里", "在车上", "在店里", "在走廊里"]
WANT_COUNT = "一杯 两杯 三杯 一碗 两碗 一盘 两盘 一份 三份".split()
WANT_THING = {
    "杯": "热茶 豆浆 果汁 凉水 牛奶".split(),
    "碗": "米饭 汤面 馄饨 南瓜粥".split(),
    "盘": "蒸饺 炒年糕 水果 花生".split(),
    "份": "菜单 报纸 地图 点心".split(),
}
ORDER_STYLES = [
    "给我{a}！",
    "你{a}，快点！",
    "{a}，听见没有？",
    "叫你{a}，还不快点！",
    "喂，{a}！",
    "{a}，别磨蹭！",
]
DONT_STYLES = ["别{a}！", "不许{a}！", "你别{a}了，烦死了！", "谁让你{a}的？"]
WANT_STYLES = ["我要{a}！", "给我{a}！", "快给我{a}！", "{a}，快点上！"]
WHERE_STYLES = ["喂，{a}在哪儿？", "{a}在哪儿，快说！", "你说，{a}在哪儿？"]
POLITE = {
    "order": "麻烦您{a}，谢谢。",
    "dont": "请您不要{a}，好吗？",
    "want": "请问可以给我{a}吗？",
    "where": "您好，请问{a}在哪里？",
}
STYLES = {"order": ORDER_STYLES, "dont": DONT_STYLES, "want": WANT_STYLES, "where": WHERE_STYLES}

# Persona: (answer, wordings); the last two wordings of each are asked only in the test.
PERSONA: dict[str, tuple[str, list[str]]] = {
    "who": ("我是 cllm 的小助手。",
            ["你是谁？", "你叫什么名字？", "你的名字是什么？", "怎么称呼你？", "介绍一下你自己。", "你叫什么？", "请你自我介绍一下。",
             "说说你是谁。", "我该怎么称呼你？", "请介绍一下自己。", "能告诉我你的名字吗？"]),
    "maker": ("我是 cllm 的作者训练出来的。",
              ["谁做了你？", "你是谁做的？", "谁训练了你？", "你是谁训练出来的？", "你的作者是谁？", "你从哪里来？", "是谁把你做出来的？",
               "你是哪里来的？", "谁是你的作者？", "把你训练出来的人是谁？"]),
    "skill": ("我会答问题、写数字、找信息、辨好坏、说客气话。",
              ["你会做什么？", "你能做什么？", "你有什么本领？", "你会些什么？", "你能帮我做什么？", "你有什么用？", "说说你的本领。",
               "你都会干什么？", "你能干什么？", "你会什么本领？"]),
    "size": ("我很小，只有几百万个参数。",
             ["你有多大？", "你有多少参数？", "你是大模型吗？", "你的模型大不大？", "你的参数多不多？", "你这个模型有多大？", "你大吗？",
              "你有几个参数？", "你的模型有多大？", "你一共有多少参数？"]),
    "limit": ("不是，我只认识一个小小的演示世界。",
              ["你什么都知道吗？", "你什么都懂吗？", "天下的事你都知道吗？", "你是不是什么都知道？", "真实世界的事你知道吗？", "你认识全世界吗？",
               "世界上的事你都懂吗？", "你是不是什么都懂？", "天下的事你都懂吗？", "你是不是全都知道？"]),
    "language": ("我只会说中文。",
                 ["你会说什么语言？", "你会英语吗？", "你会说英语吗？", "你能说几种语言？", "你说什么语言？", "你懂外语吗？", "你会说外语吗？",
                  "你会几种语言？", "你会说几种语言？", "你懂英语吗？"]),
    "human": ("我不是人，我是一个程序。",
              ["你是人吗？", "你是真人吗？", "你是不是人？", "你是机器人吗？", "你是人还是程序？", "和我说话的是真人吗？", "你是不是机器？",
               "你是真的人吗？", "你是不是真人？", "你是人还是机器？"]),
    "net": ("我不能上网，只在这台电脑上运行。",
            ["你能上网吗？", "你会上网吗？", "你能上网查东西吗？", "你在哪里运行？", "你连着网吗？", "你可以上网吗？", "你运行在哪里？",
             "没有网你能用吗？", "你可以上网查东西吗？", "你在什么地方运行？"]),
    "hello": ("你好，有什么可以帮您？",
              ["你好！", "您好！", "早上好！", "下午好！", "晚上好！", "嗨，你好！", "你好呀！", "小助手，你好！", "您好呀！", "中午好！"]),
    "thanks": ("不客气，很高兴帮到您。",
               ["谢谢！", "谢谢你！", "多谢！", "太谢谢你了！", "非常感谢！", "感谢你！", "谢谢你的帮助！", "谢谢你，小助手！", "谢谢您！",
                "多谢你的帮助！"]),
    "bye": ("再见，欢迎再来找我。",
            ["再见！", "拜拜！", "我走了，再见！", "下次再见！", "我要走了。", "明天见！", "今天就到这里吧。", "小助手，再见！", "我先走了。",
             "今天先到这里，再见！"]),
}  # fmt: skip
PERSONS, SHOPS = 84, 40
PERSONA_HEAD = ["", "请问，", "小助手，", "我想问，"]
GREETINGS = {"hello", "thanks", "bye"}  # these take no "may I ask" in front
PERSONA_HELD_OUT = 2


def to_chinese(number: int) -> str:
    """1..9999 -> the Chinese reading: 12 -> 十二, 305 -> 三百零五, 4020 -> 四千零二十."""
    text, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // unit % 10
        if digit:
            text += ("零" if zero else "") + "零一二三四五六七八九"[digit] + name
        zero = not digit and bool(text)
    return text[1:] if text.startswith("一十") else text


@dataclass(frozen=True)
class Entity:
    name: str
    kind: str
    values: dict[str, str]
    pronoun: str
    held_out: bool  # told in pretraining, never asked about in the training instructions


@dataclass
class World:
    """Entities with their facts, and the held-out numbers and persons."""

    seed: int
    entities: list[Entity] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        names = [s + h + t for s in SURNAMES for h in GIVEN_HEAD for t in GIVEN_TAIL]
        rng.shuffle(names)
        shops = [h + t for h in SHOP_HEADS for t in SHOP_TAILS]
        rng.shuffle(shops)
        pools = {"city": CITIES, "job": JOBS, "hobby": HOBBIES, "dish": DISHES, "pet": PETS, "month": MONTHS,
                 "owner": OWNERS, "hour": HOURS, "river": RIVERS, "specialty": SPECIALTIES, "flower": FLOWERS,
                 "landmark": LANDMARKS, "activity": ACTIVITIES, "food": FESTIVAL_FOODS}  # fmt: skip
        for kind, members, share in (
            ("person", names[:PERSONS], 0.25), ("shop", shops[:SHOPS], 0.25), ("city", CITIES[:], 0.25), ("festival", FESTIVALS[:], 0.25),
        ):  # fmt: skip
            held = set(rng.sample(members, int(len(members) * share)))
            for name in members:
                goods = next((GOODS[tail] for tail in SHOP_TAILS if name.endswith(tail)), [])
                values = {
                    attribute: rng.choice(pools.get(attribute, goods)) for attribute in FACTS[kind]
                }
                pronoun = rng.choice("他她") if kind == "person" else ""
                self.entities.append(Entity(name, kind, values, pronoun, name in held))
        self.strangers = names[
            PERSONS:
        ]  # names for events; the first 60 only ever appear in the test rows
        self.held_out_strangers = set(self.strangers[:60])
        self.held_out_numbers = set(rng.sample(range(13, 10000), 1500))
